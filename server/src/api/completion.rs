//! `/v1/completions`.

use serde::Deserialize;
use serde_json::json;

use super::{
    ApiError, Asked, Kind, Limits, ask,
    fields::Fields,
    parameters::{MAX_LIKELY, Parameters},
    reply::Reply,
};
use crate::served::Served;

/// Tokens that are written where the request does not say, as in OpenAI's API.
const USUAL_TOKENS: usize = 16;

#[derive(Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

pub fn read(mut fields: Fields, served: &Served, limits: &Limits) -> Result<Asked, ApiError> {
    let prompts = match fields.take("prompt")? {
        None => return Err(ApiError::value("prompt", "it is missing")),
        Some(Prompt::Text(text)) => encoded(&[text], served, limits)?,
        Some(Prompt::Texts(texts)) => encoded(&texts, served, limits)?,
        Some(Prompt::Tokens(tokens)) => vec![tokens],
        Some(Prompt::TokenLists(lists)) => lists,
    };
    let mut parameters = Parameters::take(&mut fields, served, limits)?;
    parameters.limit = parameters.limit.or(Some(USUAL_TOKENS));
    parameters.take_response_format(&mut fields)?;
    parameters.likely = fields.take_in("logprobs", 0..=MAX_LIKELY)?;
    fields.refuse_unless("echo", &json!(false))?;
    fields.refuse_unless("suffix", &json!(""))?;
    fields.refuse_unless("best_of", &json!(parameters.n))?;
    fields.finish()?;
    let reply = Reply::new(Kind::Completion, &limits.name, &parameters, false);
    ask(prompts, &parameters, reply, served, limits)
}

fn encoded(texts: &[String], served: &Served, limits: &Limits) -> Result<Vec<Vec<u32>>, ApiError> {
    if texts.len() > limits.parallel {
        let message =
            format!("found {} prompts, expected {} at most", texts.len(), limits.parallel);
        return Err(ApiError::value("prompt", message));
    }
    let tokens = texts.iter().map(|text| served.document_tokens(text));
    let tokens = tokens.collect::<slim_runtime::Result<_>>();
    tokens.map_err(|error| ApiError::value("prompt", error.to_string()))
}
