//! A real model, SmolLM2-135M-Instruct as `scripts/fetch-model` fetches it: its path in `SLIMLLM_TEST_MODEL`.

use slim_converter::BUILT_IN_CALIBRATION;

use crate::support::{Dir, succeed};

fn model() -> Option<String> {
    let model = std::env::var("SLIMLLM_TEST_MODEL").ok();
    if model.is_none() {
        println!("skipped: SLIMLLM_TEST_MODEL is not set; run `make test`");
    }
    model
}

#[test]
fn real_model_has_its_perplexity() {
    let Some(model) = model() else { return };
    let dir = Dir::new();
    let text = &dir.write("text.txt", BUILT_IN_CALIBRATION);
    let eval = ["eval", &model, "--text", text, "--context", "512", "--windows", "1", "--json"];
    let perplexity = succeed(&eval).json()["perplexity"].as_f64().unwrap();
    println!("perplexity {perplexity}");
    // By this command, whose 20.10 on ten windows of the test text is also that of transformers.
    assert!((perplexity - 15.66).abs() < 0.05, "{perplexity}");
}

#[test]
fn real_model_continues_a_sentence() {
    let Some(model) = model() else { return };
    let run = ["run", &model, "-p", "The capital of France is", "-n", "2", "--temperature", "0"];
    assert_eq!(succeed(&run).stdout, " Paris.\n");
}
