"""What people run: the tools of cpinfer. Nothing imports them but each other, the files of `tools/` and tests."""
