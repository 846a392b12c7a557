//! What `inspect` prints for people.

use std::collections::BTreeMap;

use serde_json::Value as Json;
use slim_formats::{
    gguf::Value,
    slim::{Fault, LayerInfo},
};

use super::{
    contents::{Contents, WeightSize, bits_per_weight},
    json,
};
use crate::output::{count, facts, one_line, plural, size, table};

/// Elements of an array that are shown, and characters of a string.
const SHOWN_ELEMENTS: usize = 6;
const SHOWN_CHARACTERS: usize = 64;

pub fn summary(contents: &Contents) -> String {
    let provenance = provenance_facts(contents);
    let gap = if provenance.is_empty() { "" } else { "\n" };
    format!("{}{gap}{}", facts(&summary_facts(contents)), facts(&provenance))
}

/// What a person asks first.
pub fn summary_facts(contents: &Contents) -> Vec<(&'static str, String)> {
    let mut lines = vec![
        ("format", contents.format.to_owned()),
        (
            "architecture",
            one_line(contents.architecture.as_deref().unwrap_or("not told")).into_owned(),
        ),
    ];
    if let Some(name) = contents.metadata.str("general.name") {
        lines.push(("name", one_line(name).into_owned()));
    }
    let (bytes, parameters) = (contents.file_bytes, contents.parameters());
    let in_parts = match contents.parts() {
        1 => String::new(),
        parts => format!(" in {parts} parts"),
    };
    lines.push(("size", format!("{} ({} bytes){in_parts}", size(bytes), count(bytes))));
    lines.push(("tensors", count(contents.tensors.len() as u64)));
    lines.push(("parameters", count(parameters)));
    if let Some(bits) = bits_per_weight(contents.linear_layers()) {
        let (all, quantized) = (contents.linear_layers(), contents.quantized_layers());
        let layers = plural(all.count(), "linear layer");
        let mut figure = format!("{bits:.3} in {layers} of the blocks, everything counted");
        if let Some(of_quantized) = bits_per_weight(quantized.clone()).filter(|&of| of != bits) {
            figure += &format!("; {of_quantized:.3} in the {} quantized ones", quantized.count());
        }
        lines.push(("bits per weight", figure));
    }
    for (label, name) in [("embedding", "token_embd.weight"), ("output", "output.weight")] {
        if let Some(weight) = contents.weight(name) {
            let (kind, bits) = (&weight.kind, weight.bits_per_weight());
            lines.push((label, format!("{kind}, {bits:.2} bits per weight")));
        }
    }
    if let Some(hash) = contents.template_sha256() {
        lines.push(("chat template", format!("sha256 {hash}")));
    }
    match contents.layers() {
        [] => lines.push(("types", types(&contents.weights))),
        layers => {
            lines.push(("scales", codings(layers)));
            lines.push(("widths", width_histogram(layers)));
        }
    }
    lines
}

/// How many weights there are of each type: `F32 61, Q4_1 210`.
fn types(weights: &[WeightSize]) -> String {
    let mut counts = BTreeMap::new();
    for weight in weights {
        *counts.entry(&weight.kind).or_insert(0) += 1;
    }
    counts.iter().map(|(kind, count)| format!("{kind} {count}")).collect::<Vec<_>>().join(", ")
}

/// The scale codings of the layers, each once.
fn codings(layers: &[LayerInfo]) -> String {
    let mut codings: Vec<String> =
        layers.iter().map(|layer| layer.layout.coding().to_string()).collect();
    codings.sort();
    codings.dedup();
    codings.join("; ")
}

/// The share of the weights of the blocks that have each width.
fn width_histogram(layers: &[LayerInfo]) -> String {
    let mut weights = [0; 9];
    for layer in layers.iter().filter(|layer| layer.name.starts_with("blk.")) {
        for group in layer.layout.groups() {
            weights[usize::from(group.bit_width.bits())] += group.cols.len() * layer.layout.rows();
        }
    }
    let total = weights.iter().sum::<usize>().max(1) as f64;
    let share = |(bits, &weights): (usize, &usize)| {
        (weights > 0).then(|| format!("{bits} bits {:.1} %", 100.0 * weights as f64 / total))
    };
    weights.iter().enumerate().filter_map(share).collect::<Vec<_>>().join(", ")
}

/// Where the file comes from, by its own account.
pub fn provenance_facts(contents: &Contents) -> Vec<(&str, String)> {
    let prefixes = ["slim.source.", "slim.quantization.", "slim.calibration."];
    // For `--metadata`: they would fill the screen.
    let long = ["slim.source.bytes", "slim.source.sha256"];
    let entries = contents.metadata.iter();
    entries
        .filter(|(key, _)| prefixes.iter().any(|prefix| key.starts_with(prefix)))
        .filter(|(key, _)| !long.contains(key))
        .map(|(key, value)| (key, preview(value)))
        .collect()
}

pub fn tensors(contents: &Contents) -> String {
    let shape = |shape: &[u64]| shape.iter().map(u64::to_string).collect::<Vec<_>>().join(" x ");
    let rows = contents.tensors.iter().map(|tensor| {
        [
            one_line(&tensor.name).into_owned(),
            tensor.dtype.clone(),
            shape(&tensor.shape),
            count(tensor.bytes),
        ]
    });
    table(3, ["tensor", "type", "shape", "bytes"], rows)
}

/// A digit per group, in column order: the map of the bit-widths.
pub fn bit_widths(contents: &Contents) -> String {
    let layers = contents.layers();
    let width = layers.iter().map(|layer| short_name(layer).len()).max().unwrap_or(0);
    let mut text = match layers {
        [] => "no layers with bit-widths per group\n".to_owned(),
        _ => "layer, mean width, relative output error | width of each group in column order\n"
            .to_owned(),
    };
    for layer in layers {
        let error = layer.error.map_or("-".to_owned(), |error| format!("{error:.5}"));
        let head =
            format!("{:width$} {:5.2} bits {error:>8} | ", short_name(layer), mean_width(layer));
        let indent = format!("\n{:1$}| ", "", head.len() - 2);
        text += &format!("{head}{}\n", digits(layer).join(&indent));
    }
    text
}

/// `blk.0.ffn_up.0` for band `blk.0.ffn_up.weight.0`.
pub fn short_name(layer: &LayerInfo) -> String {
    one_line(&layer.name).replace(".weight", "")
}

pub fn mean_width(layer: &LayerInfo) -> f64 {
    let groups = layer.layout.groups().iter();
    let bits: usize =
        groups.map(|group| group.cols.len() * usize::from(group.bit_width.bits())).sum();
    bits as f64 / layer.layout.cols() as f64
}

/// The widths of a layer's groups in lines of 40, in tens.
fn digits(layer: &LayerInfo) -> Vec<String> {
    let digits: String =
        layer.layout.groups().iter().map(|group| group.bit_width.bits().to_string()).collect();
    let tens: Vec<&str> =
        (0..digits.len()).step_by(10).map(|at| &digits[at..digits.len().min(at + 10)]).collect();
    tens.chunks(4).map(|line| line.join(" ")).collect()
}

pub fn metadata(contents: &Contents) -> String {
    let entries = contents.metadata.iter();
    let line = |(key, value): (&str, &Value)| format!("{} = {}\n", one_line(key), preview(value));
    entries.map(line).collect()
}

/// The start of a value that may be megabytes long.
pub fn preview(value: &Value) -> String {
    preview_of(&json::value(value))
}

fn preview_of(value: &Json) -> String {
    match value {
        Json::Array(values) => {
            let shown: Vec<String> = values.iter().take(SHOWN_ELEMENTS).map(preview_of).collect();
            match values.len() > SHOWN_ELEMENTS {
                true => {
                    format!("[{}, ...] ({} values)", shown.join(", "), count(values.len() as u64))
                }
                false => format!("[{}]", shown.join(", ")),
            }
        }
        Json::String(text) => match text.char_indices().nth(SHOWN_CHARACTERS) {
            Some((end, _)) => format!("{:?}... ({} bytes)", &text[..end], count(text.len() as u64)),
            None => format!("{text:?}"),
        },
        other => other.to_string(),
    }
}

pub fn faults(faults: &[Fault]) -> String {
    let mut text = format!("{}\n", plural(faults.len(), "fault"));
    for Fault { rule, place, found, expected } in faults {
        let rule = if rule.is_empty() { String::new() } else { format!(" (rule {rule})") };
        let fault = format!("{place}: found {found}, expected {expected}{rule}");
        text += &format!("  {}\n", one_line(&fault));
    }
    text
}

pub fn no_faults(contents: &Contents) -> String {
    match contents.format {
        "slim" => "no faults: every rule of the format and every checksum holds\n".to_owned(),
        _ => "no faults: the structure is sound, and every number is one; this format has no checksums\n"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use slim_formats::slim::{BitWidth, LayerLayout, ScaleCoding};

    use super::*;

    fn layer(groups: usize) -> LayerInfo {
        let widths: Vec<BitWidth> =
            (0..groups).map(|group| BitWidth::new((group % 3 + 2) as u8).unwrap()).collect();
        let layout = LayerLayout::new(16, 64 * groups, 64, ScaleCoding::Paper, &widths).unwrap();
        LayerInfo { name: "blk.0.attn_q.weight".to_owned(), layout, error: None }
    }

    #[test]
    fn digits_of_many_groups_fill_lines_of_tens() {
        assert_eq!(digits(&layer(9)), ["234234234"]);
        assert_eq!(
            digits(&layer(86)),
            [
                "2342342342 3423423423 4234234234 2342342342",
                "3423423423 4234234234 2342342342 3423423423",
                "423423"
            ]
        );
    }

    #[test]
    fn preview_shows_the_start_and_the_length() {
        let numbers: Vec<u32> = (0..1000).collect();
        assert_eq!(preview_of(&Json::from(numbers)), "[0, 1, 2, 3, 4, 5, ...] (1,000 values)");
        assert_eq!(preview_of(&Json::from("short")), "\"short\"");
        let long = preview_of(&Json::from("a".repeat(5000)));
        assert_eq!(long, format!("\"{}\"... (5,000 bytes)", "a".repeat(64)));
    }
}
