"""Hosts: the programs whose model an estimate runs on, behind one boundary (`base.Host`)."""
