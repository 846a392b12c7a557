//! `slimllm run`: generates text.

use std::{
    io::{self, BufRead, IsTerminal, Write},
    time::Instant,
};

use anyhow::{Result, ensure};
use slim_formats::ModelSource;
use slim_runtime::{
    ChatFormat, KvCache, Message, Model, Sampler, TextStream, Tokenizer, document_tokens,
    end_tokens,
};

use crate::{
    args::RunArgs,
    failure::advised,
    open::{check_context, tokenizer},
    output::{note, plural, print},
};

/// The context without `--context`, where the model was made for more: keeps the cache small.
const DEFAULT_CONTEXT: usize = 4096;

pub fn run(args: &RunArgs) -> Result<()> {
    args.execution.start()?;
    let start = Instant::now();
    let source = args.model.open()?;
    let tokenizer = tokenizer(&*source)?;
    let config = source.config();
    let context = args.context.unwrap_or(config.context_length.min(DEFAULT_CONTEXT));
    check_context(config, context)?;
    let model = args.execution.load(&*source, context)?;
    let mut session = Session {
        cache: model.new_cache(context)?,
        held: Vec::new(),
        sampler: Sampler::new(args.sampling.settings())?,
        limit: args.tokens,
        ends: end_tokens(&*source, &tokenizer),
        model,
        tokenizer: &tokenizer,
    };
    note(format_args!("load {:.2} s", start.elapsed().as_secs_f64()));
    if args.chat {
        let format = chat_format(&*source, &tokenizer)?;
        return chat(&mut session, &format, args.prompt.clone());
    }
    let prompt = args.prompt.as_deref().unwrap_or_default();
    let tokens = document_tokens(&tokenizer, config, prompt)?;
    ensure!(!tokens.is_empty(), "the prompt is empty");
    session.answer(&tokens).map(drop)
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
        note(format_args!("warning: {warning}"));
    }
    Ok(format)
}

/// Answers messages from stdin, after `first`, until `/exit` or the end of the input.
fn chat(session: &mut Session<'_>, format: &ChatFormat<'_>, first: Option<String>) -> Result<()> {
    let mut messages = Vec::new();
    let mut next = first;
    while let Some(message) = next.map_or_else(read_message, |message| Ok(Some(message)))? {
        messages.push(Message::new("user", message));
        let answer = session.answer(&format.tokens(&messages)?)?;
        messages.push(Message::new("assistant", answer));
        next = None;
    }
    Ok(())
}

/// The next line that says something, `None` at `/exit` and at the end of the input.
fn read_message() -> Result<Option<String>> {
    loop {
        if io::stdin().is_terminal() {
            // Talk, like `note`, on the line of what is typed.
            let _ = write!(io::stderr(), "> ");
        }
        let mut line = String::new();
        let bytes = io::stdin().lock().read_line(&mut line)?;
        match line.trim() {
            _ if bytes == 0 => return Ok(None),
            "/exit" => return Ok(None),
            "" => {}
            message => return Ok(Some(message.to_owned())),
        }
    }
}

/// A model in the middle of a text.
struct Session<'a> {
    model: Model<'a>,
    tokenizer: &'a Tokenizer,
    cache: KvCache,
    /// The tokens in `cache`.
    held: Vec<u32>,
    sampler: Sampler,
    /// Tokens of one answer at most.
    limit: usize,
    /// The tokens that end it.
    ends: Vec<u32>,
}

impl Session<'_> {
    /// Continues `prompt`, printing the text as it comes and then the timings.
    fn answer(&mut self, prompt: &[u32]) -> Result<String> {
        let mut fresh = self.not_yet_held(prompt).to_vec();
        let (mut prefill, mut decode) = (Timing::default(), Timing::default());
        let mut stream = TextStream::new(self.tokenizer, prompt);
        let mut answer = String::new();
        for index in 0..self.limit {
            let timing = if index == 0 { &mut prefill } else { &mut decode };
            let token = timing.measure(fresh.len(), || self.next_token(&fresh))?;
            if self.ends.contains(&token) {
                break;
            }
            if let Some(text) = stream.push(token)? {
                print(&text)?;
                answer += &text;
            }
            if self.held.len() == self.cache.capacity() {
                note(format_args!(
                    "\nstopped: the context of {} is full",
                    plural(self.held.len(), "token")
                ));
                break;
            }
            fresh = vec![token];
        }
        let rest = stream.finish()?;
        print(&format!("{rest}\n"))?;
        note(format_args!("prefill {prefill}; decode {decode}"));
        Ok(answer + &rest)
    }

    /// The end of `prompt` that has to go through the model; forgets what does not belong to `prompt`.
    fn not_yet_held<'p>(&mut self, prompt: &'p [u32]) -> &'p [u32] {
        match prompt.strip_prefix(self.held.as_slice()) {
            Some(fresh) if !fresh.is_empty() => fresh,
            _ => {
                self.cache.clear();
                self.held.clear();
                prompt
            }
        }
    }

    fn next_token(&mut self, fresh: &[u32]) -> Result<u32> {
        let needed = self.held.len() + fresh.len();
        if needed > self.cache.capacity() {
            let message = format!(
                "the text has {}, but the context holds {}",
                plural(needed, "token"),
                self.cache.capacity()
            );
            return Err(advised(message, "raise `--context`"));
        }
        self.held.extend(fresh);
        Ok(self.model.next_token(fresh, &mut self.cache, &mut self.sampler, &self.held)?)
    }
}

/// Tokens that went through the model, and how long that took.
#[derive(Default)]
struct Timing {
    tokens: usize,
    seconds: f64,
}

impl Timing {
    fn measure<T>(&mut self, tokens: usize, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = work();
        self.tokens += tokens;
        self.seconds += start.elapsed().as_secs_f64();
        result
    }
}

impl std::fmt::Display for Timing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", plural(self.tokens, "token"))?;
        match self.tokens {
            0 => Ok(()),
            tokens => write!(f, " at {:.1} tokens/s", tokens as f64 / self.seconds),
        }
    }
}
