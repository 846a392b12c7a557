//! How errors reach the user: the chain once, then a hint.

use std::{error::Error, fmt, io, path::Path};

use slim_converter::ConvertError;
use slim_exporter::ExportError;
use slim_formats::FormatError;
use slim_hub::HubError;
use slim_kernels::KernelError;
use slim_runtime::RuntimeError;
use slim_server::ServerError;

use crate::output::{note, one_line};

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
    note(format_args!("error: {}", one_line(&format!("{error:#}"))));
    if let Some(hint) = error.chain().find_map(hint) {
        note(format_args!("\nhint: {}", one_line(&hint)));
    }
}

/// Whether the reader of our output has gone, as `head` does.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io_errors = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>());
    io_errors.into_iter().any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

/// Whether the user asked the command to stop.
pub fn is_interruption(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(ConvertError::Interrupted))
}

/// The advice of an error about a file. Of a SliM file with a broken rule, it is to look for more,
/// if the error knows no better.
fn format_hint(error: &FormatError) -> Option<String> {
    let verify = |path: &Path| {
        format!("`slimllm inspect --verify {}` lists what is wrong with the file", path.display())
    };
    error.hint().or_else(|| match error {
        FormatError::Malformed { path, rule, .. } if !rule.is_empty() => Some(verify(path)),
        _ => None,
    })
}

fn hint(cause: &(dyn Error + 'static)) -> Option<String> {
    if let Some(advised) = cause.downcast_ref::<Advised>() {
        return Some(advised.hint.clone());
    }
    if let Some(error) = cause.downcast_ref::<ServerError>() {
        return error.hint();
    }
    if let Some(error) = cause.downcast_ref::<HubError>() {
        return error.hint();
    }
    if let Some(error) = cause.downcast_ref::<ExportError>() {
        return error.hint();
    }
    if let Some(error) = cause.downcast_ref::<ConvertError>() {
        return match error {
            ConvertError::Format(error) => format_hint(error),
            ConvertError::Kernel(error) => error.hint(),
            ConvertError::Runtime(error) => error.hint(),
            ConvertError::Numerical { .. } => Some(
                "try more `--samples`, another text as `--calibration`, or `--method rtn`, which uses none"
                    .to_owned(),
            ),
            _ => None,
        };
    }
    let runtime = cause.downcast_ref().and_then(RuntimeError::hint);
    let format = || cause.downcast_ref().and_then(format_hint);
    let kernel = || cause.downcast_ref().and_then(KernelError::hint);
    runtime.or_else(format).or_else(kernel)
}
