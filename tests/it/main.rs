//! The integration tests, in one binary so that they link once.

mod attacks; // templates and tokenizers that hurt
mod bound; // the smallest file that keeps a promised divergence
mod chat; // prompts, sampling settings, and the chat, piped and on a terminal
mod cli; // help, errors, exit codes, output of every subcommand
mod columns; // any number of them
mod command; // running the command
mod cuda; // the command on a CUDA device
mod docs; // what pages for users say of the command
mod end_to_end; // from a model to its packed file to its logits
mod experts; // mixtures of them: layouts of files, those that see few tokens
mod export; // other engines' layouts, read back
mod families; // by engine
mod file_size; // foretold, and met from below
mod golden_models; // logits against the reference implementation
mod hub; // models from a hub, whatever its server does
mod hybrids; // blocks with a state in place of keys and values
mod numbers; // held on their way into files, or named
mod onnx_runtime; // ONNX graphs in ONNX Runtime against our own run
mod output_safety; // what is never overwritten, and what an early end leaves
mod pages; // looking into a file, and at what differs
mod parts; // SliM files in several files
mod quality; // what a conversion says of its result
mod real_model; // a real model, where there is one
mod reports; // what commands say of their results
mod reproduce; // files that are made again
mod resume; // conversions that ended early
mod schemas; // every JSON document against its schema
mod serve; // the server, its API and its errors
mod sources; // what is read of a source, refused, or warned of
mod special_tokens; // start, stop and chat tokens, the same from every container
mod split; // GGUF models in several files
mod terminal; // texts from files are made visible
