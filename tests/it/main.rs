//! The integration tests, in one binary so that they link once.

mod cli; // help, errors, exit codes, output of every subcommand
mod command; // running the command
mod cuda; // the command on a CUDA device
mod end_to_end; // from a model to its packed file to its logits
mod export; // other engines' layouts, read back
mod file_size; // foretold, and met from below
mod golden_models; // logits against the reference implementation
mod onnx_runtime; // ONNX graphs in ONNX Runtime against our own run
mod output_safety; // what is never overwritten, and what an early end leaves
mod real_model; // a real model, where there is one
