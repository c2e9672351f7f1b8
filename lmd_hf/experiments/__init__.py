"""The paper's experiments: one file each, a plain function from seeds to an `Outcome`; `lmd-hf reproduce NAME`."""
