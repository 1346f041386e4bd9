"""Run configs, one file per run: get_config(arg) -> ConfigDict of every key. See common.py."""
