//! A real model, SmolLM2-135M-Instruct as `scripts/fetch-model` fetches it.

use crate::command::{arg, real_model, succeed, test_data};

#[test]
fn real_model_has_its_perplexity() {
    let Some(model) = real_model() else { return };
    let text = &arg(&test_data("wikitext-2-valid.txt"));
    let model = &arg(&model);
    let eval = ["eval", model, "--text", text, "--context", "512", "--windows", "1", "--json"];
    let perplexity = succeed(&eval).json()["perplexity"].as_f64().unwrap();
    println!("perplexity {perplexity}");
    // By this command, whose 20.10 on ten windows of the test text is also what transformers gives.
    assert!((perplexity - 15.66).abs() < 0.05, "{perplexity}");
}

#[test]
fn real_model_continues_a_sentence() {
    let Some(model) = real_model() else { return };
    let prompt = "The capital of France is";
    let run = ["run", &arg(&model), "-p", prompt, "-n", "2", "--temperature", "0"];
    assert_eq!(succeed(&run).stdout, " Paris.\n");
}

#[test]
fn real_model_tokenizes_the_test_text_like_transformers() {
    let Some(model) = real_model() else { return };
    let source = slim_formats::open_model(model.as_ref()).unwrap();
    let tokenizer = slim_runtime::Tokenizer::new(source.tokenizer()).unwrap();
    let text = include_str!("../data/wikitext-2-test.raw").replace("\r\n", "\n");
    let tokens = tokenizer.encode(&text).unwrap();
    assert_eq!(tokens.len(), 301_948);
    assert!(tokenizer.decode(&tokens).unwrap() == text);
}
