"""The patterns that ship with liger_compile: one file a family, every module here is loaded."""
