//! The `slimllm` command.

fn main() {}
