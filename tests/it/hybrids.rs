//! Models some of whose blocks have a state in place of keys and values.

use std::collections::HashMap;

use safetensors::Dtype;
use slim_formats::{ModelSource, arch::Mixer, open_model};
use slim_kernels::weight;
use slim_runtime::{Model, Turn};

use crate::{
    command::{Dir, arg, fail, files_in, succeed, test_data, tiny_model},
    sources::{StoredTensor, copy_with_tensors},
};

const TOKENS: [u32; 12] = [1, 17, 42, 5, 99, 250, 7, 3, 200, 61, 8, 130];

/// The logits that follow each token, fed in pieces of these lengths.
fn logits_in(model: &Model, pieces: &[usize]) -> Vec<f32> {
    let (mut sequence, mut workspace) = (model.sequence(64).unwrap(), model.workspace().unwrap());
    let (mut tokens, mut states) = (&TOKENS[..], Vec::new());
    for &piece in pieces {
        let tokens = tokens.split_off(..piece).unwrap();
        let turn = Turn { tokens, sequence: &mut sequence };
        states.extend(model.forward(turn, &mut workspace).unwrap());
    }
    model.logits(&states).unwrap()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// A vector of a model.
fn vector(source: &dyn ModelSource, name: &str) -> Vec<f32> {
    let found = source.tensor(name).unwrap().unwrap();
    let mut values = vec![0.0; weight::shape(found).1];
    weight::dequantize_rows(found, 0..1, &mut values).unwrap();
    values
}

/// llama.cpp's converter computes `1 + w` and `-exp(A_log)` in half precision. With those values
/// the folder that its files were made from gives the same logits.
#[test]
fn files_of_llama_cpp_are_their_folders_but_for_rounded_vectors() {
    for file in files_in(&test_data("gguf-rounded")) {
        let name = file.file_stem().unwrap().to_str().unwrap();
        let source = open_model(&file).unwrap();
        let dir = Dir::new();
        let folder = dir.path("rounded");
        copy_with_tensors(name, &folder, |tensors| replace_rounded(&*source, tensors));
        let [expected, found] =
            [&folder, &file].map(|path| logits_in(&Model::open(path).unwrap(), &[TOKENS.len()]));
        let difference = largest_difference(&found, &expected);
        assert!(difference < 1e-4, "{name}: {difference}");
    }
}

/// Puts the vectors of a GGUF file whose values were computed into a folder's tensors.
fn replace_rounded(source: &dyn ModelSource, tensors: &mut HashMap<String, StoredTensor>) {
    let mut put = |name: String, values: Vec<f32>| {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert!(tensors.insert(name, (vec![values.len()], bytes, Dtype::F32)).is_some());
    };
    let less_one = |name: &str| vector(source, name).into_iter().map(|w| w - 1.0).collect();
    put("model.norm.weight".into(), less_one("output_norm.weight"));
    for (index, block) in source.decoder().blocks.iter().enumerate() {
        let ours = |name: &str| format!("blk.{index}.{name}");
        let theirs = |name: &str| format!("model.layers.{index}.{name}");
        put(theirs("input_layernorm.weight"), less_one(&ours("attn_norm.weight")));
        put(theirs("post_attention_layernorm.weight"), less_one(&ours("ffn_norm.weight")));
        let Mixer::DeltaNet(net) = block.mixer else {
            put(theirs("self_attn.q_norm.weight"), less_one(&ours("attn_q_norm.weight")));
            put(theirs("self_attn.k_norm.weight"), less_one(&ours("attn_k_norm.weight")));
            continue;
        };
        let rates = vector(source, &ours("ssm_a"));
        // The converter's order is one head of each group after the other.
        let shared = net.value_heads / net.key_heads;
        let place = |head: usize| match net.is_tiled {
            true => head % shared * net.key_heads + head / shared,
            false => head,
        };
        let logarithms = (0..net.value_heads).map(|head| (-rates[place(head)]).ln()).collect();
        put(theirs("linear_attn.A_log"), logarithms);
    }
}

/// A state goes on where it was left, however a text is cut.
#[test]
fn texts_in_pieces_are_those_in_one() {
    for name in ["qwen3-5", "qwen3-next", "lfm2"] {
        let model = Model::open(tiny_model(name)).unwrap();
        let whole = logits_in(&model, &[12]);
        for pieces in [&[1; 12][..], &[1, 2, 3, 6], &[7, 1, 4]] {
            let difference = largest_difference(&logits_in(&model, pieces), &whole);
            assert!(difference < 1e-4, "{name}, {pieces:?}: {difference}");
        }
    }
}

/// What a sequence goes on from is never something else than what it says it holds.
#[test]
fn truncated_texts_go_on_from_a_copy_or_from_nothing() {
    let model = Model::open(tiny_model("qwen3-5")).unwrap();
    let expected = logits_in(&model, &[12]);
    let vocab = model.config().vocab_size;
    let mut workspace = model.workspace().unwrap();
    for left in 0..12 {
        let mut sequence = model.sequence(64).unwrap();
        let mut feed = |tokens: &[u32], sequence: &mut _| {
            model.step(&mut [Turn { tokens, sequence }], &mut workspace).unwrap()
        };
        feed(&TOKENS[..5], &mut sequence);
        feed(&TOKENS[5..9], &mut sequence);
        feed(&TOKENS[9..10], &mut sequence);
        feed(&[300], &mut sequence);
        sequence.truncate(left);
        // A copy was made before the second step of several tokens.
        let held = match left {
            11 => 11,
            5.. => 5,
            _ => 0,
        };
        assert_eq!(sequence.tokens().len(), held, "of {left}");
        if held < 11 {
            let found = feed(&TOKENS[held..], &mut sequence);
            let difference = largest_difference(&found, &expected[11 * vocab..]);
            assert!(difference < 1e-4, "{left}: {difference}");
        }
    }
}

/// The last tokens of a prompt are read by themselves, so that the same prompt need not be read
/// again.
#[test]
fn prompts_are_read_but_for_their_last_tokens_where_they_were_read_before() {
    let model = Model::open(tiny_model("qwen3-5")).unwrap();
    let sequence = model.sequence(64).unwrap();
    let pieces = [40, 17, 16, 1].map(|unread| sequence.next_piece(unread, 30));
    assert_eq!(pieces, [24, 1, 16, 1]);
    assert_eq!(
        Model::open(tiny_model("llama")).unwrap().sequence(64).unwrap().next_piece(40, 30),
        30
    );
}

/// As published models have them.
#[test]
fn tensors_that_guess_further_tokens_are_left_out_and_named() {
    let dir = Dir::new();
    let folder = dir.path("model");
    copy_with_tensors("qwen3-5", &folder, |tensors| {
        let norm = tensors["model.norm.weight"].clone();
        tensors.insert("mtp.norm.weight".into(), norm);
    });
    let answer = succeed(&["inspect", &arg(&folder)]);
    let warning = "blocks that guess further tokens are left out (1 tensors)";
    assert!(answer.stderr.contains(warning), "{}", answer.stderr);
}

/// llama.cpp takes value heads in another order than transformers: what would be garbage is
/// refused.
#[test]
fn value_heads_in_another_order_are_not_exported() {
    let dir = Dir::new();
    let folder = arg(&tiny_model("qwen3-5"));
    let refused = ["value heads in another order"];
    fail(&["export", &folder, "--to", "gguf", "-o", &dir.arg("a.gguf")], &refused);
    let file = arg(&test_data("gguf-rounded").join("qwen3-5.gguf"));
    let refused = ["in the order of llama.cpp"];
    fail(&["export", &file, "--to", "safetensors", "-o", &dir.arg("b")], &refused);
    succeed(&["export", &file, "--to", "gguf", "-o", &dir.arg("c.gguf")]);
}
