//! OpenAI's API: what a request asks for, and how what was written is told.

mod chat;
mod completion;
mod error;
mod fields;
mod messages;
mod parameters;
mod reply;

pub use error::ApiError;
pub use reply::Reply;

use crate::{engine::Job, served::Served};
use fields::Fields;
use parameters::Parameters;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use crate::engine::{Draw, Sent};

/// News that are kept for a client that does not read.
const KEPT_NEWS: usize = 64;

/// What bounds requests.
#[derive(Debug, Clone)]
pub struct Limits {
    /// The model's name.
    pub name: String,
    /// Tokens of a text, prompt included.
    pub context: usize,
    /// Texts at a time, and so of a request.
    pub parallel: usize,
}

/// The two things that can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Chat,
    Completion,
}

/// A request that can be answered: its texts, what comes of them, and how to tell it.
pub struct Asked {
    pub jobs: Vec<Job>,
    pub news: Receiver<Sent>,
    pub reply: Reply,
    /// Whether the answer is to come in pieces.
    pub stream: bool,
}

/// Reads the body of a request. It may take long: templates are rendered, texts are cut into
/// tokens, grammars are read.
///
/// # Errors
/// What is wrong with the request, and its status.
pub fn read(kind: Kind, body: &[u8], served: &Served, limits: &Limits) -> Result<Asked, ApiError> {
    let mut fields = Fields::parse(body)?;
    if let Some(name) = fields.take::<String>("model")?
        && name != limits.name
    {
        return Err(ApiError::no_model(&name, &limits.name));
    }
    match kind {
        Kind::Chat => chat::read(fields, served, limits),
        Kind::Completion => completion::read(fields, served, limits),
    }
}

/// The texts of a request: `n` of each prompt, each with a seed of its own.
fn ask(
    prompts: Vec<Vec<u32>>,
    parameters: &Parameters,
    mut reply: Reply,
    served: &Served,
    limits: &Limits,
) -> Result<Asked, ApiError> {
    let count = prompts.len().saturating_mul(parameters.n);
    if count > limits.parallel {
        return Err(ApiError::value(
            "n",
            format!(
                "the request asks for {count} texts, but {} are written at a time",
                limits.parallel
            ),
        ));
    }
    for prompt in &prompts {
        check_prompt(prompt, served, limits)?;
    }
    let (client, news) = channel(KEPT_NEWS);
    reply.expect(prompts.iter().map(Vec::len), parameters.n);
    let mut jobs = Vec::with_capacity(count);
    for prompt in prompts {
        for _ in 0..parameters.n {
            let choice = jobs.len();
            jobs.push(job(prompt.clone(), choice, parameters, served, client.clone())?);
        }
    }
    Ok(Asked { jobs, news, reply, stream: parameters.stream })
}

fn job(
    prompt: Vec<u32>,
    choice: usize,
    parameters: &Parameters,
    served: &Served,
    client: Sender<Sent>,
) -> Result<Job, ApiError> {
    let grammar = match &parameters.form {
        None => None,
        Some(form) => {
            let grammars = served.grammars().map_err(ApiError::internal)?;
            let start = grammars.start(form, served.ends());
            Some(start.map_err(|reason| ApiError::value(parameters.form_name, reason))?)
        }
    };
    let draw = Draw {
        sampler: parameters.sampler(choice, served)?,
        penalties: parameters.penalties.clone(),
        grammar,
        likely: parameters.likely,
        known: served.tokenizer().vocab_size(),
    };
    let (limit, stops) = (parameters.limit, parameters.stops.clone());
    let arrived = std::time::Instant::now();
    let is_repeatable = parameters.are_repeatable;
    Ok(Job { prompt, limit, draw, is_repeatable, stops, choice, client, arrived })
}

fn check_prompt(prompt: &[u32], served: &Served, limits: &Limits) -> Result<(), ApiError> {
    let (context, vocab) = (limits.context, served.model().config().vocab_size);
    if prompt.is_empty() {
        return Err(ApiError::value("prompt", "the prompt has no tokens"));
    }
    if prompt.len() >= context {
        return Err(ApiError::too_long(prompt.len(), context));
    }
    match prompt.iter().find(|&&token| token as usize >= vocab) {
        None => Ok(()),
        Some(token) => Err(ApiError::value(
            "prompt",
            format!("token {token} is not in the vocabulary, which has {vocab}"),
        )),
    }
}
