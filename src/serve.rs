//! `slimllm serve`: a model over HTTP.

use std::path::Path;

use anyhow::{Context as _, Result};
use slim_runtime::DEFAULT_CONTEXT;
use slim_server::{Server, Settings};

use crate::{
    args::ServeArgs,
    interrupt::on_wish_to_end,
    open::check_context,
    output::{note, plural, warn},
};

/// Where the key of clients may stand, too.
const API_KEY: &str = "SLIMLLM_API_KEY";

pub fn run(args: &ServeArgs) -> Result<()> {
    args.execution.start()?;
    let source = args.model.open()?;
    let config = source.config();
    let context = args.context.unwrap_or(config.context_length.min(DEFAULT_CONTEXT));
    check_context(config, context)?;
    let model = args.execution.load(&source, context)?;
    let settings = Settings {
        name: name_of(source.path()),
        parallel: args.parallel,
        context,
        queue: args.queue,
        api_key: args.api_key.clone().or_else(key_of_environment),
        log: Box::new(|line| note(line)),
    };
    let has_key = settings.api_key.is_some();
    let server = Server::bind(model, &args.host, args.port, settings)?;
    server.warnings().iter().for_each(|warning| warn(warning));
    if !has_key && !server.address().ip().is_loopback() {
        warn("whoever reaches this address may use the model: `--api-key` asks for a key");
    }
    let stopper = server.stopper();
    on_wish_to_end(move || {
        note("stopping: texts that are being written may end; again ends at once");
        stopper.stop();
    })
    .context("cannot catch Ctrl-C")?;
    note(format_args!(
        "serving `{}` at http://{} ({} at a time, {} each)",
        source.path().display(),
        server.address(),
        plural(args.parallel, "text"),
        plural(context, "token"),
    ));
    Ok(server.run()?)
}

fn key_of_environment() -> Option<String> {
    std::env::var(API_KEY).ok().filter(|key| !key.is_empty())
}

/// What clients call the model: the name of its file or folder.
fn name_of(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let endings = [".slim.gguf", ".gguf", ".onnx"];
    let stem = endings.iter().find_map(|ending| name.strip_suffix(ending));
    stem.unwrap_or(&name).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_called_by_their_files() {
        for (path, name) in
            [("a/b.slim.gguf", "b"), ("b.Q4_K.gguf", "b.Q4_K"), ("folder", "folder")]
        {
            assert_eq!(name_of(Path::new(path)), name);
        }
    }
}
