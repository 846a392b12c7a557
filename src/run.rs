//! `slimllm run`: generates text.

mod answer;
mod chat;
mod conversation;
mod input;
mod prompt;
mod sampling;

use std::time::Instant;

use anyhow::Result;
use slim_formats::ModelSource;
use slim_runtime::{
    ChatFormat, DEFAULT_CONTEXT, Generator, Sampler, Tokenizer, document_tokens, end_tokens,
};

use crate::{
    args::RunArgs,
    failure::advised,
    open::{check_context, tokenizer},
    output::{note, plural, warn},
};
use answer::{Interrupt, print_answer};
use chat::Chat;
use conversation::Conversation;
use sampling::Sampling;

pub use prompt::PromptArgs;

pub fn run(args: &RunArgs) -> Result<()> {
    let prompt = args.prompt.read()?;
    args.execution.start()?;
    let start = Instant::now();
    let source = args.model.open()?;
    let tokenizer = tokenizer(&*source)?;
    let config = source.config();
    let context = args.context.unwrap_or(config.context_length.min(DEFAULT_CONTEXT));
    check_context(config, context)?;
    let sampling = Sampling::new(&args.sampling, &config.generation);
    let sampler = Sampler::new(sampling.settings.clone())?;
    let model = args.execution.load(&source, context)?;
    let format = args.chat.then(|| chat_format(&*source, &tokenizer)).transpose()?;
    let ends = match &format {
        Some(format) => format.end_tokens(),
        None => end_tokens(&*source, &tokenizer),
    };
    let mut generator = Generator::new(&model, &tokenizer, ends, context, sampler)?;
    note(format_args!("load {:.2} s", start.elapsed().as_secs_f64()));
    note(&sampling);
    let limit = args.tokens.0;
    if let Some(format) = format {
        let mut conversation = Conversation::new(format, context);
        if let Some(system) = &args.system {
            conversation.set_system(system)?;
        }
        return Chat::new(generator, conversation, limit, sampling).run(source.path(), prompt);
    }
    let tokens = prompt_tokens(&*source, &tokenizer, &prompt.unwrap_or_default(), context)?;
    print_answer(generator.generate(&tokens, limit)?, context, &Interrupt::default()).map(drop)
}

/// The tokens of a text to continue, which the context has room for.
fn prompt_tokens(
    source: &dyn ModelSource,
    tokenizer: &Tokenizer,
    prompt: &str,
    context: usize,
) -> Result<Vec<u32>> {
    let config = source.config();
    let tokens = document_tokens(tokenizer, config, prompt)?;
    match tokens.len() {
        0 => Err(advised(
            "the prompt is empty, and the model has no token that starts a text",
            "give a text to continue: `-p TEXT`",
        )),
        length if length > context => {
            let message = format!(
                "the prompt has {}, but the context holds {context}",
                plural(length, "token")
            );
            Err(match config.context_length {
                most if most > context => {
                    advised(message, format!("raise `--context`, up to {most} for this model"))
                }
                _ => advised(message, "shorten it: the model was made for no longer texts"),
            })
        }
        _ => Ok(tokens),
    }
}

/// How the model writes a chat; what is wrong with that is told.
fn chat_format<'a>(
    source: &'a dyn ModelSource,
    tokenizer: &'a Tokenizer,
) -> Result<ChatFormat<'a>> {
    let Some(template) = source.chat_template() else {
        let message = format!("`{}`: the model has no chat template", source.path().display());
        return Err(advised(message, "continue a text instead: `-p TEXT` without `--chat`"));
    };
    let (format, warnings) = ChatFormat::new(template, source.config(), tokenizer)?;
    for warning in warnings {
        warn(&warning);
    }
    Ok(format)
}
