"""The webui runs this before it starts. There is nothing to install: everything needed comes with the webui.

The optimizers Lion and Prodigy work where their packages are installed; the menu says so where they are not.
"""
