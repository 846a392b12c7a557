use std::path::Path;

use serde_json::{Value as Json, json};

use super::*;
use crate::gguf::{Metadata, Value};

fn llama() -> Json {
    json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2,
    })
}

/// The configuration with the keys of `changes` replaced; `null` stands for an absent key.
fn changed(mut config: Json, changes: &Json) -> Json {
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    config
}

fn read(config: &Json) -> Result<ModelConfig> {
    read_with_warnings(config).map(|(config, _)| config)
}

fn read_with_warnings(config: &Json) -> Result<(ModelConfig, Vec<String>)> {
    let mut warnings = Vec::new();
    let path = Path::new("config.json");
    Ok((ModelConfig::from_hugging_face(path, config, None, &mut warnings)?, warnings))
}

#[test]
fn hugging_face_old_spelling_is_read() {
    let config = read(&llama()).unwrap();
    assert_eq!((config.head_dim, config.kv_head_count, config.block_count), (16, 2, 2));
    assert_eq!((config.rope.theta, config.rope.is_unscaled()), (10000.0, true));
    assert_eq!((config.bos_token_id, config.eos_token_ids), (Some(1), vec![2]));
    assert_eq!((config.sliding_window, config.tied_embeddings), (None, false));
}

#[test]
fn hugging_face_both_spellings_of_rope_agree() {
    let values = json!({
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    });
    let old = json!({"rope_theta": 5e5, "rope_scaling": changed(values.clone(), &json!({"type": "llama3"}))});
    let new = json!({
        "rope_theta": null,
        "rope_parameters": changed(values, &json!({"rope_type": "llama3", "rope_theta": 5e5})),
    });
    let old = read(&changed(llama(), &old)).unwrap().rope;
    assert_eq!(old, read(&changed(llama(), &new)).unwrap().rope);
    // Wavelengths 2 pi, 32.4, 167, ...: below 16 kept, above 64 divided by 8, between interpolated.
    assert_eq!(old.factors[0], 1.0);
    assert!(1.0 < old.factors[1] && old.factors[1] < 8.0);
    assert_eq!(old.factors[2..], [8.0; 6]);
}

#[test]
fn hugging_face_linear_scaling_divides_every_frequency() {
    let config = changed(llama(), &json!({"rope_scaling": {"rope_type": "linear", "factor": 4}}));
    assert_eq!(read(&config).unwrap().rope.factors, [4.0; 8]);
}

#[test]
fn hugging_face_generation_config_names_the_end_tokens() {
    let generation = json!({"eos_token_id": [7, 8, 9]});
    let path = Path::new("config.json");
    let config =
        ModelConfig::from_hugging_face(path, &llama(), Some(&generation), &mut Vec::new()).unwrap();
    assert_eq!((config.bos_token_id, config.eos_token_ids), (Some(1), vec![7, 8, 9]));
}

#[test]
fn hugging_face_only_mistral_slides() {
    let window = json!({"sliding_window": 16});
    assert_eq!(read(&changed(llama(), &window)).unwrap().sliding_window, None);
    let mistral = changed(changed(llama(), &window), &json!({"model_type": "mistral"}));
    assert_eq!(read(&mistral).unwrap().sliding_window, Some(16));
}

#[test]
fn hugging_face_bad_configurations_are_refused() {
    let llama3 = |low: f64, high: f64| {
        json!({"rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64,
            "low_freq_factor": low, "high_freq_factor": high,
        }})
    };
    let cases = [
        (json!({"model_type": null}), false, "key `model_type`: found none"),
        (json!({"model_type": "gpt2"}), true, "model type `gpt2`"),
        (json!({"hidden_size": null}), false, "key `hidden_size`: found none"),
        (json!({"hidden_size": "64"}), false, "key `hidden_size`: found \"64\""),
        (json!({"hidden_size": -1}), false, "key `hidden_size`: found -1"),
        (json!({"hidden_size": 0}), false, "hidden size: found 0"),
        (json!({"num_attention_heads": 0}), false, "expected 1 to"),
        (json!({"num_hidden_layers": 1_u64 << 40}), false, "block count"),
        (json!({"num_key_value_heads": 3}), false, "a divisor of the 4 query heads"),
        (json!({"head_dim": 15}), false, "an even number"),
        (json!({"head_dim": i64::MAX}), false, "head size"),
        (json!({"hidden_size": u64::MAX}), false, "hidden size"),
        (json!({"model_type": "gemma2", "num_hidden_layers": 1_u64 << 40}), false, "block count"),
        (
            json!({
                "model_type": "ministral3",
                "rope_parameters": {
                    "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0,
                    "llama_4_scaling_beta": 0.1,
                },
            }),
            false,
            "context before RoPE scaling: found 0",
        ),
        (json!({"rms_norm_eps": null}), false, "key `rms_norm_eps`"),
        (json!({"rms_norm_eps": 0.0}), false, "RMS norm epsilon"),
        (json!({"rope_theta": -1.0}), false, "RoPE"),
        (json!({"hidden_act": "gelu"}), true, "key `hidden_act` of \"gelu\" in a llama model"),
        (json!({"architectures": ["LlamaForSequenceClassification"]}), true, "the class"),
        (json!({"rope_scaling": {"type": "spiral"}}), true, "RoPE scaling `spiral`"),
        (json!({"rope_scaling": {"type": "yarn"}}), false, "key `factor`"),
        (json!({"rope_scaling": {"type": "linear"}}), false, "key `factor`"),
        (json!({"rope_scaling": {"type": "linear", "factor": 0}}), false, "RoPE factor: found 0"),
        (json!({"partial_rotary_factor": 0.5}), true, "partial_rotary_factor"),
        (
            json!({"rope_scaling": {"factor": 4.0}}),
            true,
            "key `factor` of `rope_scaling` with RoPE scaling `default`: 4.0",
        ),
        (
            json!({"rope_scaling": {"type": "linear", "factor": 4.0, "beta_fast": 32}}),
            true,
            "key `beta_fast`",
        ),
        (
            json!({"rope_scaling": {"full_attention": {"rope_type": "default"}}}),
            true,
            "key `full_attention`",
        ),
        (
            json!({"rope_scaling": {"rope_type": "linear", "type": "llama3", "factor": 4}}),
            false,
            "key `type`: found `llama3`, expected `linear` as in `rope_type`",
        ),
        (
            json!({"rope_parameters": {"rope_theta": 5e5}}),
            false,
            "key `rope_theta`: found 10000, expected 500000 as in `rope_parameters`",
        ),
        (
            json!({
                "rope_parameters": {"rope_type": "default"},
                "rope_scaling": {"type": "linear", "factor": 2},
            }),
            false,
            "expected the same as in `rope_parameters`",
        ),
        (json!({"attention_multiplier": 0.0156}), true, "key `attention_multiplier` of 0.0156"),
        (json!({"embedding_multiplier": 12.0}), true, "key `embedding_multiplier`"),
        (json!({"logits_scaling": 8}), true, "key `logits_scaling`"),
        (json!({"final_logit_softcapping": 30.0}), true, "key `final_logit_softcapping`"),
        (json!({"num_local_experts": 8}), true, "key `num_local_experts`"),
        (json!({"rope_local_base_freq": 1e4}), true, "key `rope_local_base_freq`"),
        (
            json!({"layer_types": ["full_attention", "sliding_attention"]}),
            true,
            "key `layer_types`",
        ),
        (llama3(4.0, 4.0), false, "key `high_freq_factor`"),
        (json!({"eos_token_id": [1, "x"]}), false, "key `eos_token_id`"),
        (
            json!({"model_type": "mistral", "num_key_value_heads": null}),
            false,
            "key `num_key_value_heads`",
        ),
    ];
    for (changes, is_unsupported, fragment) in cases {
        let error = read(&changed(llama(), &changes)).expect_err(fragment);
        assert_eq!(matches!(error, FormatError::Unsupported { .. }), is_unsupported, "{error}");
        assert!(error.to_string().contains(fragment), "{changes}: {error}");
    }
}

#[test]
fn hugging_face_neutral_keys_are_read_over() {
    let changes = json!({
        "architectures": ["LLaMAForCausalLM"], "attention_bias": false, "mlp_bias": false,
        "hidden_act": "swish", "attention_multiplier": 0.25, "embedding_multiplier": 1.0,
        "logits_scaling": 1, "final_logit_softcapping": null, "partial_rotary_factor": 1.0,
        "layer_types": ["full_attention", "full_attention"], "pretraining_tp": 2, "use_cache": true,
        "torch_dtype": "bfloat16", "transformers_version": "4.40.0", "max_length": 20,
        "rope_scaling": {"rope_type": "default", "factor": 1.0}, "_name_or_path": "x",
    });
    let (config, warnings) = read_with_warnings(&changed(llama(), &changes)).unwrap();
    assert_eq!((config, warnings), (read(&llama()).unwrap(), vec![]));
}

#[test]
fn hugging_face_unknown_keys_are_warned_of() {
    let changes = json!({"wavelet_gate": [1, 2], "nothing": null, "sliding_window": 16});
    let (_, warnings) = read_with_warnings(&changed(llama(), &changes)).unwrap();
    assert_eq!(
        warnings,
        [
            "`config.json`: key `wavelet_gate` of [1,2] is not read: it is unknown in a llama model",
            "`config.json`: key `sliding_window` of 16 is not read: it is unknown in a llama model",
        ]
    );
}

fn from_gguf(metadata: &Metadata, factors: Option<Vec<f32>>) -> Result<ModelConfig> {
    let facts = TensorFacts { factors, ..TensorFacts::default() };
    ModelConfig::from_gguf(Path::new("model.gguf"), metadata, facts)
}

#[test]
fn gguf_keys_round_trip() {
    let changes = json!({
        "model_type": "mistral", "sliding_window": 16, "eos_token_id": [2, 3, 4, 5], "rope_theta": 1e6,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    });
    let mut config = read(&changed(llama(), &changes)).unwrap();
    config.name = Some("tiny".to_owned());
    config.add_bos = true;
    assert!(config.rope_vectors().is_empty(), "a key says a factor that all pairs have");
    assert_eq!(from_gguf(&config.to_gguf(), None).unwrap(), config);
    config.rope.factors[3] = 4.0;
    let [(_, factors)] = config.rope_vectors()[..] else { panic!("no tensor of factors") };
    let factors = factors.to_vec();
    assert_eq!(from_gguf(&config.to_gguf(), Some(factors)).unwrap(), config);

    let plain = read(&llama()).unwrap();
    assert_eq!(from_gguf(&plain.to_gguf(), None).unwrap(), plain);
}

type Entry<'a> = (&'a str, Value);

/// The keys of a valid configuration, some left out, some added.
fn keys(without: &str, with: Option<Entry<'_>>) -> Metadata {
    let mut metadata = Metadata::new();
    for (key, value) in read(&llama()).unwrap().to_gguf().iter().filter(|&(key, _)| key != without)
    {
        metadata.insert(key, value.clone()).unwrap();
    }
    if let Some((key, value)) = with {
        metadata.insert(key, value).unwrap();
    }
    metadata
}

#[test]
fn gguf_alternatives_are_read() {
    let ffn = "llama.feed_forward_length";
    assert_eq!(
        from_gguf(&keys(ffn, Some((ffn, vec![160u32, 160].into()))), None).unwrap().ffn_size,
        160
    );

    let tokens = ("tokenizer.ggml.tokens", vec!["a".to_owned(); 5].into());
    assert_eq!(from_gguf(&keys("llama.vocab_size", Some(tokens)), None).unwrap().vocab_size, 5);

    let eot = ("tokenizer.ggml.eot_token_id", 9u32.into());
    assert_eq!(from_gguf(&keys("", Some(eot)), None).unwrap().eos_token_ids, [2, 9]);

    let sentence_piece = ("tokenizer.ggml.model", "llama".into());
    assert!(
        from_gguf(&keys("tokenizer.ggml.add_bos_token", Some(sentence_piece)), None)
            .unwrap()
            .add_bos
    );

    let mut linear = keys("", Some(("llama.rope.scaling.type", "linear".into())));
    linear.insert("llama.rope.scaling.factor", 2.0f32).unwrap();
    assert_eq!(from_gguf(&linear, Some(vec![3.0; 8])).unwrap().rope.factors, [6.0; 8]);
}

#[test]
fn gguf_every_spelling_of_linear_scaling_is_read() {
    let read = |entries: &[Entry<'_>]| {
        let mut metadata = keys("", None);
        for (key, value) in entries {
            metadata.insert(format!("llama.rope.{key}"), value.clone()).unwrap();
        }
        from_gguf(&metadata, None).map(|config| config.rope.factors)
    };
    let linear = || ("scaling.type", "linear".into());
    for (entries, factor) in [
        (vec![("scale_linear", 4f32.into())], 4.0),
        (vec![("scaling.factor", 4f32.into())], 4.0),
        (vec![linear(), ("scale_linear", 4f32.into())], 4.0),
        (vec![linear(), ("scaling.factor", 4f32.into()), ("scale_linear", 4f32.into())], 4.0),
        (vec![("scaling.factor", 0f32.into())], 1.0),
        (vec![("scaling.type", "none".into()), ("scaling.factor", 4f32.into())], 1.0),
        (
            vec![
                ("scaling.factor", 4f32.into()),
                ("scaling.original_context_length", 2048u32.into()),
                ("scaling.finetuned", true.into()),
                ("scaling.attn_factor", 1f32.into()),
            ],
            4.0,
        ),
    ] {
        assert_eq!(read(&entries).unwrap(), [factor; 8], "{entries:?}");
    }
    let error =
        read(&[("scaling.factor", 4f32.into()), ("scale_linear", 2f32.into())]).unwrap_err();
    let expected =
        "key `llama.rope.scale_linear`: found 2, expected 4 as in `llama.rope.scaling.factor`";
    assert!(error.to_string().contains(expected), "{error}");
}

#[test]
fn gguf_counts_are_checked_before_a_family_uses_them() {
    for (key, count) in [("block_count", 1_u64 << 40), ("attention.head_count", 0)] {
        let mut metadata = Metadata::new();
        metadata.insert("general.architecture", "gemma3").unwrap();
        for (key, value) in read(&llama()).unwrap().to_gguf().iter() {
            let Some(own) = key.strip_prefix("llama.") else { continue };
            metadata.insert(format!("gemma3.{own}"), value.clone()).unwrap();
        }
        let mut changed = Metadata::new();
        for (found, value) in metadata.iter().filter(|(found, _)| !found.ends_with(key)) {
            changed.insert(found, value.clone()).unwrap();
        }
        changed.insert(format!("gemma3.{key}"), count).unwrap();
        let error = from_gguf(&changed, None).unwrap_err();
        assert!(error.to_string().contains(" count: found "), "{error}");
    }
}

#[test]
fn gguf_bad_keys_are_refused() {
    let ffn = "llama.feed_forward_length";
    let rope_dimensions = "llama.rope.dimension_count";
    let cases: [(&str, Option<Entry<'_>>, bool, &str); 16] = [
        (
            "",
            Some(("llama.attention.wobble", 1u32.into())),
            true,
            "key `llama.attention.wobble` of 1",
        ),
        ("", Some(("llama.rope.scaling.yarn_beta", 1f32.into())), true, "yarn_beta` of 1"),
        ("", Some(("mistral.rope.freq_base", 1e6f32.into())), true, "key `mistral.rope.freq_base`"),
        ("", Some(("llama.expert_count", 8u32.into())), false, "experts of a token: found 0"),
        ("", Some(("llama.logit_scale", 8f32.into())), true, "key `llama.logit_scale`"),
        ("", Some(("llama.attention.scale", 0.5f32.into())), true, "key `llama.attention.scale`"),
        ("", Some(("llama.use_parallel_residual", true.into())), true, "use_parallel_residual"),
        ("", Some(("llama.tensor_data_layout", "reference".into())), true, "tensor_data_layout"),
        ("general.architecture", None, false, "key `general.architecture`: found none"),
        ("llama.block_count", None, false, "key `llama.block_count`: found none"),
        (ffn, Some((ffn, vec![160u32, 80].into())), false, "the same for all blocks"),
        (ffn, Some((ffn, "160".into())), false, "found \"160\""),
        ("llama.vocab_size", None, false, "key `llama.vocab_size`"),
        (rope_dimensions, Some((rope_dimensions, 8u32.into())), true, "beside a head size of 16"),
        ("", Some(("llama.rope.scaling.type", "spiral".into())), true, "RoPE scaling `spiral`"),
        (
            "",
            Some(("llama.rope.scaling.type", "linear".into())),
            false,
            "key `llama.rope.scaling.factor`",
        ),
    ];
    for (without, with, is_unsupported, fragment) in cases {
        let error = from_gguf(&keys(without, with), None).expect_err(fragment);
        assert_eq!(matches!(error, FormatError::Unsupported { .. }), is_unsupported, "{error}");
        assert!(error.to_string().contains(fragment), "{error}");
    }
    let error = from_gguf(&keys("", None), Some(vec![1.0; 3])).unwrap_err();
    assert!(error.to_string().contains("number of RoPE factors: found 3"), "{error}");
}

#[test]
fn hugging_face_keys_are_read_back() {
    let llama3 = |factor: f64, original: u64| {
        json!({
            "rope_theta": 5e5, "head_dim": 128, "num_attention_heads": 4,
            "rope_scaling": {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            },
        })
    };
    let small = json!({
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    });
    for changes in [
        json!({}),
        json!({"model_type": "mistral", "sliding_window": 64, "rms_norm_eps": 1e-5}),
        json!({"eos_token_id": [2, 5, 7], "bos_token_id": null, "tie_word_embeddings": true}),
        json!({"rope_scaling": {"rope_type": "linear", "factor": 4}}),
        llama3(8.0, 8192),
        llama3(32.0, 8192),
        small,
    ] {
        let config = read(&changed(llama(), &changes)).unwrap();
        let (json, generation) = config.to_hugging_face(Path::new("m")).unwrap();
        let (path, mut warnings) = (Path::new("c"), Vec::new());
        let found = ModelConfig::from_hugging_face(path, &json, Some(&generation), &mut warnings);
        let found = found.unwrap();
        assert!(warnings.is_empty(), "{warnings:?}");
        for (found, expected) in found.rope.factors.iter().zip(&config.rope.factors) {
            assert!((found - expected).abs() <= 1e-4 * expected, "{changes}: {found} {expected}");
        }
        let rope = config.rope.clone();
        assert_eq!(ModelConfig { rope, ..found }, config, "{changes}");
    }
    let config = read(&changed(llama(), &llama3(8.0, 8192))).unwrap();
    let scaling = &config.to_hugging_face(Path::new("m")).unwrap().0["rope_scaling"];
    assert_eq!(scaling["original_max_position_embeddings"], 8192);
    assert!((scaling["high_freq_factor"].as_f64().unwrap() - 4.0).abs() < 1e-3, "{scaling}");
}

#[test]
fn hugging_face_factors_of_no_kind_are_refused() {
    let mut config = read(&llama()).unwrap();
    for factors in
        [[1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0], [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]
    {
        config.rope.factors = factors.to_vec();
        let error = config.to_hugging_face(Path::new("m")).unwrap_err();
        assert!(matches!(error, FormatError::Unsupported { .. }), "{error}");
    }
}
