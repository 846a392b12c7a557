//! `slimllm completions`: what a shell completes, and the manual pages.

use std::{
    fs,
    io::{self, Write as _},
    path::Path,
};

use anyhow::{Context as _, Result};
use clap::CommandFactory;

use crate::args::{Args, CompletionsArgs};

pub fn run(args: &CompletionsArgs) -> Result<()> {
    if let Some(folder) = &args.man {
        return write_manual(folder)
            .with_context(|| format!("`{}`: cannot write the manual pages", folder.display()));
    }
    if let Some(shell) = args.shell {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Args::command(), "slimllm", &mut script);
        io::stdout().write_all(&script)?;
    }
    Ok(())
}

/// Writes a page for the command and one for each subcommand, `slimllm.1` and `slimllm-convert.1`,
/// into a folder that does not exist yet.
fn write_manual(folder: &Path) -> io::Result<()> {
    // The version that users see names the processor, which pages for others must not.
    let command = Args::command().version(env!("CARGO_PKG_VERSION")).disable_help_subcommand(true);
    fs::create_dir(folder)?;
    clap_mangen::generate_to(command, folder)
}
