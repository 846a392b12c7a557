//! The `slimllm` command.
//!
//! One module per subcommand. Only this crate parses arguments, prints, and chooses exit codes.

mod args;
mod bench;
mod card;
mod completions;
mod compute;
mod convert;
mod diff;
mod eval;
mod export;
mod failure;
mod fetch;
mod habits;
mod html;
mod inspect;
mod interrupt;
mod logits;
mod open;
mod output;
mod progress;
mod reproduce;
mod run;
mod serve;
mod target;

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use slim_runtime::{isolate_chat_templates, render_for_parent};

use crate::{
    args::{Args, Command},
    output::note,
};

/// What a command that ran to its end has to say.
enum Outcome {
    /// It did what it was asked.
    Done,
    /// The answer is no: `inspect --verify` found faults, `diff` a difference, or `reproduce --run`
    /// other bytes.
    No,
}

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return unparsed(&error),
    };
    isolate_chat_templates(|| {
        let mut program = std::process::Command::new(own_program());
        program.arg("render-template");
        program
    });
    match dispatch(args.command) {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::No) => ExitCode::from(1),
        Err(error) if failure::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            failure::report(&error);
            interrupt::tell_leftovers();
            ExitCode::from(match failure::is_interruption(&error) {
                true => interrupt::EXIT_INTERRUPTED,
                false => 2,
            })
        }
    }
}

/// The file that this process runs, whatever has its name by now.
fn own_program() -> PathBuf {
    match cfg!(target_os = "linux") {
        true => "/proc/self/exe".into(),
        false => std::env::current_exe().unwrap_or_default(),
    }
}

/// Prints help, the version, or what is wrong with the arguments, which may be names of files.
fn unparsed(error: &clap::Error) -> ExitCode {
    match habits::explain(std::env::args_os()) {
        _ if !error.use_stderr() => drop(error.print()),
        Some((habit, advice)) => {
            failure::report(&failure::advised(format!("there is no `{habit}` here"), advice));
        }
        None => note(error.render().to_string().trim_end()),
    }
    ExitCode::from(error.exit_code() as u8)
}

fn dispatch(command: Command) -> anyhow::Result<Outcome> {
    interrupt::explain_lost_pages()?;
    match command {
        Command::Convert(args) => convert::run(&args)?,
        Command::Run(args) => run::run(&args)?,
        Command::Inspect(args) => return inspect::run(&args),
        Command::Diff(args) => return diff::run(&args),
        Command::Eval(args) => eval::run(&args)?,
        Command::Logits(args) => logits::run(&args)?,
        Command::Bench(args) => bench::run(&args)?,
        Command::Export(args) => export::run(&args)?,
        Command::Reproduce(args) => return reproduce::run(&args),
        Command::Serve(args) => serve::run(&args)?,
        Command::Completions(args) => completions::run(&args)?,
        Command::RenderTemplate => render_for_parent()?,
    }
    Ok(Outcome::Done)
}
