"""Run configs: one file is one run, get_config(arg) its ConfigDict. See common.py for `arg`."""
