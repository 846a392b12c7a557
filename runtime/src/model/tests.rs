use std::path::{Path, PathBuf};

use super::*;
use crate::{Event, RuntimeError, SamplerSettings, Settings};

/// How far the logits of a turn among others are from those of the turn alone, by the norm of the
/// difference: sums of f32 in another order. Measured 4.3e-7.
const TURN_ERROR: f64 = 2e-6;

const CONTEXT: usize = 64;

/// Models that differ in what they compute.
const MODELS: [&str; 7] = ["llama", "gemma2", "phi3", "opt", "ministral3", "glm4-moe", "qwen2-moe"];

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/archs").join(name)
}

fn open(name: &str) -> Model {
    Model::open(path(name)).unwrap()
}

fn tokens(count: usize, seed: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * i + 7 * i + 31 * seed) % 300) as u32).collect()
}

/// A sequence that holds `tokens`.
fn holding(model: &Model, workspace: &mut Workspace, tokens: &[u32]) -> Sequence {
    let mut sequence = model.sequence(CONTEXT).unwrap();
    model.prefill(Turn { tokens, sequence: &mut sequence }, workspace).unwrap();
    sequence
}

/// The logits of turns that go together: what each sequence holds before, and its new tokens.
fn step(model: &Model, texts: &[(Vec<u32>, Vec<u32>)]) -> Vec<f32> {
    let workspace = &mut model.workspace().unwrap();
    let mut sequences: Vec<_> =
        texts.iter().map(|(held, _)| holding(model, workspace, held)).collect();
    let turns = texts.iter().zip(&mut sequences);
    let mut turns: Vec<_> =
        turns.map(|((_, tokens), sequence)| Turn { tokens, sequence }).collect();
    let logits = model.step(&mut turns, workspace).unwrap();
    for ((held, tokens), sequence) in texts.iter().zip(&sequences) {
        assert_eq!(sequence.tokens(), [&held[..], tokens].concat());
    }
    logits
}

/// Texts of different lengths, at different positions; some past the windows of the tiny models.
fn texts() -> Vec<(Vec<u32>, Vec<u32>)> {
    let lengths = [(0, 5), (17, 1), (3, 1), (30, 12), (1, 2)];
    let text = |(seed, (held, new))| (tokens(held, seed), tokens(new, seed + 10));
    lengths.into_iter().enumerate().map(text).collect()
}

fn error(found: &[f32], expected: &[f32]) -> f64 {
    let squares = |values: &mut dyn Iterator<Item = f32>| -> f64 {
        values.map(|value| f64::from(value).powi(2)).sum()
    };
    let difference = squares(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    (difference / squares(&mut expected.iter().copied())).sqrt()
}

#[test]
fn a_model_goes_to_threads_and_a_text_with_its_memory() {
    fn is_shared<T: Send + Sync>() {}
    fn is_sent<T: Send>() {}
    is_shared::<Model>();
    is_sent::<(Sequence, Workspace)>();
}

/// What 8-bit keys and values change in the logits, by the norm of the difference.
const Q8_ERROR: f64 = 2e-2;

#[test]
fn keys_and_values_of_8_bits_change_the_logits_a_little() {
    for name in ["llama", "gemma2"] {
        let texts = texts();
        let expected = step(&open(name), &texts);
        let error = error(&step(&open(name).with_kv_type(KvType::Q8), &texts), &expected);
        println!("{name}: {error:.1e}");
        assert!(error > 0.0 && error < Q8_ERROR, "{name}: {error}");
    }
}

#[test]
fn a_turn_among_others_has_the_logits_that_it_has_alone() {
    for name in MODELS.into_iter().chain(["gpt-oss"]) {
        let (model, texts) = (open(name), texts());
        let together = step(&model, &texts);
        let rows = together.chunks(model.config().vocab_size);
        assert_eq!(rows.len(), texts.len());
        for (text, found) in texts.iter().zip(rows) {
            let error = error(found, &step(&model, std::slice::from_ref(text)));
            println!("{name}, {} tokens: {error:.1e}", text.1.len());
            assert!(error < TURN_ERROR, "{name}, {} tokens: {error}", text.1.len());
        }
    }
}

/// Of gpt-oss only but for rounding: float experts by columns add up in another order with another
/// number of tokens.
#[test]
fn a_turn_does_not_depend_on_what_the_others_say() {
    for name in MODELS {
        let (model, mut texts) = (open(name), texts());
        let before = step(&model, &texts);
        for (held, new) in &mut texts[1..] {
            (*held, *new) = (tokens(held.len(), 20), tokens(new.len(), 30));
        }
        let (vocab, after) = (model.config().vocab_size, step(&model, &texts));
        assert!(before[..vocab] == after[..vocab], "{name}");
        assert!(before[vocab..] != after[vocab..], "{name}");
    }
}

#[test]
fn turns_longer_than_a_batch_are_those_of_pieces() {
    let mut model = open("llama");
    let texts = texts();
    let whole = step(&model, &texts);
    model.batch = 4;
    assert!(error(&step(&model, &texts), &whole) < TURN_ERROR);
}

#[test]
fn what_cannot_be_fed_is_refused_before_anything_is() {
    let (model, other) = (open("llama"), open("llama"));
    let (workspace, others) = (&mut model.workspace().unwrap(), &mut other.workspace().unwrap());
    let full = tokens(CONTEXT, 0);
    for (wrong, says) in [
        (&[][..], "turns[1]: tokens: found 0, expected at least one"),
        (&[1, 70_000], "turns[1]: token: found 70000, expected less than"),
        (&full, "turns[1]: tokens: found 67, expected at most 64, the size of the context"),
    ] {
        let [mut first, mut second] = [2, 3].map(|count| {
            let held = tokens(count, 0);
            holding(&model, workspace, &held)
        });
        let turns = &mut [
            Turn { tokens: &[1], sequence: &mut first },
            Turn { tokens: wrong, sequence: &mut second },
        ];
        let refused = model.step(turns, workspace).unwrap_err();
        assert!(matches!(refused, RuntimeError::InvalidArgument { .. }));
        assert!(refused.to_string().starts_with(says), "{refused}");
        assert_eq!((first.tokens().len(), second.tokens().len()), (2, 3));
    }
    let turn = &mut [Turn { tokens: &[1], sequence: &mut other.sequence(CONTEXT).unwrap() }];
    let refused = model.step(turn, workspace).unwrap_err().to_string();
    assert!(refused.starts_with("sequence: found one of another model"), "{refused}");
    let refused = other.step(&mut [], workspace).unwrap_err().to_string();
    assert!(refused.starts_with("workspace: found one of another model"), "{refused}");
    assert!(other.step(turn, others).is_ok());
    assert!(model.step(&mut [], workspace).unwrap().is_empty());
}

#[test]
fn learned_positions_end_before_anything_is_fed() {
    let model = open("opt");
    let context = model.config().context_length;
    let (mut sequence, workspace) =
        (model.sequence(2 * context).unwrap(), &mut model.workspace().unwrap());
    let tokens = &tokens(context + 1, 0)[..];
    let refused = model.step(&mut [Turn { tokens, sequence: &mut sequence }], workspace);
    let refused = refused.unwrap_err().to_string();
    assert!(refused.starts_with(&format!("positions: found {}", context + 1)), "{refused}");
    assert!(sequence.tokens().is_empty());
}

#[test]
fn generating_from_an_opened_model_is_generating_step_by_step() {
    let model = open("llama");
    let sampler = Some(SamplerSettings::greedy());
    let settings = Settings { limit: Some(8), sampler, context: None };
    let drawn =
        model.generate("the quick brown", settings).unwrap().filter_map(|event| {
            match event.unwrap() {
                Event::Token { id, .. } => Some(id),
                _ => None,
            }
        });
    let tokenizer = model.tokenizer().unwrap();
    let prompt = tokenizer.encode("the quick brown").unwrap();
    let (mut sequence, workspace) =
        (model.sequence(CONTEXT).unwrap(), &mut model.workspace().unwrap());
    let sampler = Sampler::new(SamplerSettings::greedy()).unwrap();
    let mut sampler = sampler.limited_to(tokenizer.vocab_size(), model.config().vocab_size);
    let mut next = prompt;
    for token in drawn {
        let turn = &mut [Turn { tokens: &next, sequence: &mut sequence }];
        let logits = model.step(turn, workspace).unwrap();
        assert_eq!(sampler.sample(&logits, &[]).unwrap(), token);
        next = vec![token];
    }
}

/// Keys and values of tokens that a sequence does not hold are overwritten; states have seen them.
#[test]
fn states_of_a_step_that_failed_begin_anew() {
    for (name, left) in [("llama", 9), ("qwen3-5", 0), ("lfm2", 0)] {
        let (model, held, new) = (open(name), tokens(9, 1), tokens(3, 2));
        let workspace = &mut model.workspace().unwrap();
        let mut sequence = holding(&model, workspace, &held);
        let turns = &mut [Turn { tokens: &new, sequence: &mut sequence }];
        model.logits_of(turns, workspace).unwrap();
        let failed = RuntimeError::invalid_argument("logits", "none", "some");
        assert!(settle(turns, Err::<(), _>(failed)).is_err());
        assert_eq!(sequence.tokens(), &held[..left], "{name}");
        let rest = [&held[left..], &new].concat();
        let found = model.step(&mut [Turn { tokens: &rest, sequence: &mut sequence }], workspace);
        let expected = step(&model, &[(Vec::new(), [held, new].concat())]);
        let error = error(&found.unwrap(), &expected);
        assert!(error < TURN_ERROR, "{name}: {error}");
    }
}
