//! How errors reach the user: the chain once, then a hint.

use std::{error::Error, fmt, io};

use slim_converter::ConvertError;
use slim_exporter::ExportError;
use slim_formats::FormatError;
use slim_kernels::KernelError;
use slim_runtime::RuntimeError;

use crate::output::note;

/// An error of the command itself, with advice.
#[derive(Debug)]
struct Advised {
    message: String,
    hint: String,
}

impl fmt::Display for Advised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for Advised {}

/// An error that says what the user can do about it.
pub fn advised(message: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
    Advised { message: message.into(), hint: hint.into() }.into()
}

/// Prints an error.
pub fn report(error: &anyhow::Error) {
    note(format_args!("error: {error:#}"));
    if let Some(hint) = error.chain().find_map(hint) {
        note(format_args!("\nhint: {hint}"));
    }
}

/// Whether the reader of our output has gone, as `head` does.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io_errors = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>());
    io_errors.into_iter().any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

fn hint(cause: &(dyn Error + 'static)) -> Option<String> {
    if let Some(advised) = cause.downcast_ref::<Advised>() {
        return Some(advised.hint.clone());
    }
    if let Some(error) = cause.downcast_ref::<ExportError>() {
        return error.hint();
    }
    match inner(cause) {
        Inner::Format(error) => error.hint(),
        Inner::Kernel(error) => error.hint(),
        Inner::Other => None,
    }
}

/// The error of a lower crate in an error of the crates above it, which pass it on without a level of their own.
enum Inner<'a> {
    Format(&'a FormatError),
    Kernel(&'a KernelError),
    Other,
}

fn inner<'a>(cause: &'a (dyn Error + 'static)) -> Inner<'a> {
    let runtime = match cause.downcast_ref::<ConvertError>() {
        Some(ConvertError::Format(error)) => return Inner::Format(error),
        Some(ConvertError::Kernel(error)) => return Inner::Kernel(error),
        Some(ConvertError::Runtime(error)) => Some(error),
        _ => cause.downcast_ref::<RuntimeError>(),
    };
    match runtime {
        Some(RuntimeError::Format(error)) => return Inner::Format(error),
        Some(RuntimeError::Kernel(error)) => return Inner::Kernel(error),
        _ => {}
    }
    match (cause.downcast_ref(), cause.downcast_ref()) {
        (Some(error), _) => Inner::Format(error),
        (_, Some(error)) => Inner::Kernel(error),
        _ => Inner::Other,
    }
}
