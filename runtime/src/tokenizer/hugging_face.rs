//! `tokenizer.json`.

use serde_json::Value as Json;

use super::{components::check_components, failed};
use crate::{Result, RuntimeError};

/// Builds what the JSON text describes, without its truncation and padding: those belong to
/// training batches and would cut a text silently.
pub(super) fn build(json: &str) -> Result<tokenizers::Tokenizer> {
    const REASON: &str = "`tokenizer.json` cannot be read";
    let parsed: Json = serde_json::from_str(json).map_err(|error| failed(REASON)(error.into()))?;
    check_merges(&parsed["model"])?;
    check_template(&parsed["post_processor"])?;
    check_components(&parsed)?;
    let mut tokenizer: tokenizers::Tokenizer = json.parse().map_err(failed(REASON))?;
    tokenizer.with_truncation(None).map_err(failed(REASON))?.with_padding(None);
    Ok(tokenizer)
}

/// Refuses a merge whose result is not in the vocabulary, on which the library panics if the
/// result is longer than every token.
fn check_merges(model: &Json) -> Result<()> {
    let (Some(vocab), Some(merges)) = (model["vocab"].as_object(), model["merges"].as_array())
    else {
        return Ok(());
    };
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or("");
    for merge in merges {
        let pair = match merge {
            Json::String(merge) => merge.split_once(' '),
            merge => merge[0].as_str().zip(merge[1].as_str()),
        };
        let result =
            pair.and_then(|(left, right)| Some(left.to_owned() + right.strip_prefix(prefix)?));
        if !result.is_some_and(|result| vocab.contains_key(&result)) {
            return Err(RuntimeError::tokenizer(format!("merge {merge} does not give a token")));
        }
    }
    Ok(())
}

/// Refuses a template that names an undefined special token or a second text, on which the library
/// panics.
fn check_template(processor: &Json) -> Result<()> {
    for nested in processor["processors"].as_array().into_iter().flatten() {
        check_template(nested)?;
    }
    for piece in processor["single"].as_array().into_iter().flatten() {
        let token = piece["SpecialToken"]["id"].as_str();
        let undefined = token.is_some_and(|token| processor["special_tokens"][token].is_null());
        if undefined || piece["Sequence"]["id"] == "B" {
            let reason = format!("post-processor: {piece} is not defined for a single text");
            return Err(RuntimeError::tokenizer(reason));
        }
    }
    Ok(())
}
