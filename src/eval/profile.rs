//! `eval --profile`: how far a model is from its source, kind by kind of text.

use std::{iter, path::Path, time::Instant};

use anyhow::{Result, bail};
use serde_json::{Value as Json, json};
use slim_converter::{Domain, Profile, profile};
use slim_runtime::{Difference, Divergence, Tokenizer};

use super::nats;
use crate::{
    args::EvalArgs,
    open::{is_onnx, open, resolve_context},
    output::{count, one_line, print, print_json, table},
    progress::Progress,
};

/// Characters of the text before a token that are shown with it.
const SHOWN: usize = 60;

/// Places that are shown as the worst.
const WORST: usize = 8;

pub fn run(args: &EvalArgs, against: &Path) -> Result<()> {
    if is_onnx(against) {
        bail!("`--profile` compares with a model that this program runs, not with a graph");
    }
    let start = Instant::now();
    let (found, source) = (args.model.open()?, open(against)?);
    let context = resolve_context(found.config(), args.context)?;
    let model = args.execution.load(&found, context)?;
    let source = args.execution.load(&source, context)?;
    let mut progress = Progress::new("text", Domain::ALL.len());
    let mut profiles = Vec::new();
    for domain in Domain::ALL {
        profiles.push(profile(domain, &source, &model, context)?);
        progress.step(profiles.len(), domain.name());
    }
    progress.finish();
    let tokenizer = source.tokenizer()?;
    let worst = worst(&profiles, tokenizer)?;
    match args.json {
        true => print_json(json!({
            "context": context,
            "domains": profiles.iter().map(domain_json).collect::<Json>(),
            "worst": worst.iter().map(Place::to_json).collect::<Json>(),
            "seconds": start.elapsed().as_secs_f64(),
        }))?,
        false => print(&describe(&profiles, &worst))?,
    }
    Ok(())
}

/// Where two models differ much.
struct Place {
    domain: Domain,
    kl: f64,
    /// The text before the token that is guessed.
    before: String,
    /// What follows in the text.
    follows: String,
    /// What the source finds most likely.
    source: String,
    /// What the model does.
    model: String,
}

/// The places of all texts where the models differ most, the worst first.
fn worst(profiles: &[Profile], tokenizer: &Tokenizer) -> Result<Vec<Place>> {
    let mut all: Vec<(&Profile, Difference)> =
        profiles.iter().flat_map(|of| iter::repeat(of).zip(of.evaluation.worst.clone())).collect();
    all.sort_by(|(_, a), (_, b)| b.kl.total_cmp(&a.kl));
    let text = |tokens: &[u32]| tokenizer.decode(tokens);
    let place = |&(Profile { domain, tokens, .. }, found): &(&Profile, Difference)| {
        let before = text(&tokens[..found.token])?;
        let shown = before.chars().count().saturating_sub(SHOWN);
        Ok(Place {
            domain: *domain,
            kl: found.kl,
            before: before.chars().skip(shown).collect(),
            follows: text(&tokens[found.token..][..1])?,
            source: text(&[found.theirs])?,
            model: text(&[found.ours])?,
        })
    };
    all.iter().take(WORST).map(place).collect()
}

impl Place {
    fn to_json(&self) -> Json {
        json!({
            "domain": self.domain.name(),
            "kl": self.kl,
            "before": self.before,
            "follows": self.follows,
            "source": self.source,
            "model": self.model,
        })
    }

    fn describe(&self) -> String {
        let [before, follows, source, model] =
            [&self.before, &self.follows, &self.source, &self.model].map(|text| one_line(text));
        format!(
            "{:>8}  {}: ..{before}[{follows}]\n{:10}the source expects `{source}`, the model `{model}`\n",
            nats(self.kl),
            self.domain.name(),
            ""
        )
    }
}

fn divergence(profile: &Profile) -> &Divergence {
    profile.evaluation.divergence.as_ref().expect("two models were compared")
}

fn domain_json(profile: &Profile) -> Json {
    let found = divergence(profile);
    json!({
        "domain": profile.domain.name(),
        "tokens": profile.evaluation.tokens,
        "perplexity": profile.evaluation.perplexity,
        "kl_mean": found.kl_mean,
        "kl_p50": found.kl_p50,
        "kl_p90": found.kl_p90,
        "kl_p99": found.kl_p99,
        "kl_p999": found.kl_p999,
        "top1_agreement": found.top1_agreement,
    })
}

fn describe(profiles: &[Profile], worst: &[Place]) -> String {
    let row = |profile: &Profile| {
        let found = divergence(profile);
        [
            profile.domain.name().to_owned(),
            count(profile.evaluation.tokens as u64),
            format!("{:.2}", profile.evaluation.perplexity),
            nats(found.kl_mean),
            nats(found.kl_p50),
            nats(found.kl_p90),
            nats(found.kl_p99),
            nats(found.kl_p999),
            format!("{:.1} %", 100.0 * (1.0 - found.top1_agreement)),
        ]
    };
    let head =
        ["text", "tokens", "perplexity", "KL mean", "50 %", "90 %", "99 %", "99.9 %", "flipped"];
    let places: String = worst.iter().map(Place::describe).collect();
    format!(
        "{}\nKL from the source's distribution, in nats per token, and its percentiles; flipped: \
         tokens whose\nmost likely successor is another.\n\nwhere they differ most\n{places}",
        table(1, head, profiles.iter().map(row))
    )
}
