"""Where people and programs meet the job: the tab, with and without a webui, and the command line."""
