//! The integration tests, in one binary so that they link once.

mod cli; // help, errors, exit codes, output of every subcommand
mod golden_models; // logits against the reference implementation
mod real_model; // perplexity of a real model, where there is one
mod support; // running the command
