//! What `diff` prints: text, JSON, a page.

use serde_json::{Value as Json, json};
use slim_formats::gguf::Value;

use super::{Difference, Groups, LayerDifference, WeightDifference};
use crate::{
    html::{self, Page},
    inspect::{preview, value_json},
    output::{one_line, plural, size, table},
};

/// Lines of a kind that are printed as text.
const SHOWN: usize = 20;

pub fn text(difference: &Difference) -> String {
    if difference.is_none() {
        return "no difference\n".to_owned();
    }
    let Difference { files, metadata, layers, same_weights, .. } = difference;
    let mut text = String::new();
    for (letter, file) in ["A", "B"].iter().zip(files) {
        text +=
            &format!("{letter}  {}, {}, {}\n", one_line(&file.name), file.format, size(file.bytes));
    }
    if !metadata.is_empty() {
        text += &format!("\nmetadata: {}\n", plural(metadata.len(), "key"));
        let rows = metadata.iter().take(SHOWN).map(|(key, values)| {
            let [a, b] = values.each_ref().map(shown_value);
            [one_line(key).into_owned(), a, b]
        });
        text += &table(3, ["key", "A", "B"], rows);
        text += &more(metadata.len());
    }
    let weights = by_error(difference);
    if !weights.is_empty() {
        let (differing, all) = (weights.len(), weights.len() + same_weights);
        text += &format!("\nweights: {differing} of {all} differ\n");
        let rows = weights.iter().take(SHOWN).map(|weight| {
            let [a, b] = weight.stored.each_ref().map(shown_type);
            [one_line(&weight.name).into_owned(), a, b, shown_error(weight)]
        });
        text += &table(3, ["weight", "A", "B", "relative error"], rows);
        text += &more(weights.len());
    }
    if !layers.is_empty() {
        let lines = layer_lines(layers);
        text += &format!("\nbit-widths: {} differ\n", plural(layers.len(), "layer"));
        let rows = lines.iter().take(SHOWN).cloned();
        text += &table(4, ["layer", "group", "A", "B"], rows);
        text += &more(lines.len());
    }
    text
}

/// How many lines are not shown.
fn more(lines: usize) -> String {
    match lines.saturating_sub(SHOWN) {
        0 => String::new(),
        left => format!("and {left} more, which `--json` and `--html` list\n"),
    }
}

/// The weights that differ, those without an error first, then from the largest one down.
fn by_error(difference: &Difference) -> Vec<&WeightDifference> {
    let mut weights: Vec<_> = difference.weights.iter().collect();
    let key = |weight: &WeightDifference| weight.error.unwrap_or(f64::INFINITY);
    weights.sort_by(|a, b| key(b).total_cmp(&key(a)));
    weights
}

fn shown_value(value: &Option<Value>) -> String {
    value.as_ref().map_or("-".to_owned(), |value| one_line(&preview(value)).into_owned())
}

fn shown_type(stored: &Option<(String, f64)>) -> String {
    stored.as_ref().map_or("-".to_owned(), |(kind, bits)| format!("{kind}, {bits:.2} bits"))
}

fn shown_error(weight: &WeightDifference) -> String {
    match weight.error {
        Some(error) => format!("{error:.2e}"),
        None if weight.stored.iter().all(Option::is_some) => "another shape".to_owned(),
        None => "only in one".to_owned(),
    }
}

/// A line for each group that differs.
fn layer_lines(layers: &[LayerDifference]) -> Vec<[String; 4]> {
    let lines = |layer: &LayerDifference| {
        let name = one_line(&layer.name).into_owned();
        match &layer.groups {
            Groups::Layouts([a, b]) => vec![[name, "all".to_owned(), a.clone(), b.clone()]],
            Groups::Widths(widths) => widths
                .iter()
                .map(|(group, [first, last], [a, b])| {
                    let group = format!("{group} (columns {first} to {last})");
                    [name.clone(), group, format!("{a} bits"), format!("{b} bits")]
                })
                .collect(),
        }
    };
    layers.iter().flat_map(lines).collect()
}

/// The document of `--json`. Scripts rely on its keys: add, do not rename.
pub fn json(difference: &Difference) -> Json {
    let [a, b] = difference
        .files
        .each_ref()
        .map(|file| json!({ "file": file.name, "format": file.format, "file_bytes": file.bytes }));
    let metadata = difference.metadata.iter().map(|(key, values)| {
        let [a, b] = values.each_ref().map(|value| value.as_ref().map(value_json));
        json!({ "key": key, "a": a, "b": b })
    });
    let weights = difference.weights.iter().map(|weight| {
        let [a, b] = weight.stored.each_ref().map(|stored| {
            stored.as_ref().map(|(kind, bits)| json!({ "type": kind, "bits_per_weight": bits }))
        });
        let error = weight.error.filter(|error| error.is_finite());
        json!({ "name": weight.name, "a": a, "b": b, "relative_error": error })
    });
    let layers = difference.layers.iter().map(|layer| match &layer.groups {
        Groups::Layouts([a, b]) => json!({ "name": layer.name, "a": a, "b": b, "groups": [] }),
        Groups::Widths(widths) => {
            let groups = widths.iter().map(|(group, [first, last], [a, b])| {
                json!({ "group": group, "first_column": first, "last_column": last, "a": a, "b": b })
            });
            json!({ "name": layer.name, "groups": groups.collect::<Json>() })
        }
    });
    json!({
        "same": difference.is_none(),
        "a": a,
        "b": b,
        "metadata": metadata.collect::<Json>(),
        "weights": weights.collect::<Json>(),
        "same_weights": difference.same_weights,
        "layers": layers.collect::<Json>(),
    })
}

/// The page of `--html`.
pub fn html(difference: &Difference) -> String {
    let [a, b] = &difference.files;
    let lead = match difference.is_none() {
        true => "No difference".to_owned(),
        false => format!(
            "{}, {} and {} differ",
            plural(difference.metadata.len(), "key"),
            plural(difference.weights.len(), "weight"),
            plural(difference.layers.len(), "layer")
        ),
    };
    let mut page = Page::new("Difference of two models", &lead);
    let about =
        |file: &super::File| format!("{}, {}, {}", file.name, file.format, size(file.bytes));
    page.section("Files", &html::facts(&[("A", about(a)), ("B", about(b))]));
    let cells = |row: [String; 4]| row.map(|cell| html::text(&cell));
    if !difference.layers.is_empty() {
        let rows = layer_lines(&difference.layers).into_iter().map(cells);
        let head = ["layer", "group", "A", "B"];
        page.section("Bit-widths", &html::table("Groups that differ", 4, head, rows));
    }
    if !difference.weights.is_empty() {
        let rows = by_error(difference).into_iter().map(|weight| {
            let [a, b] = weight.stored.each_ref().map(shown_type);
            cells([weight.name.clone(), a, b, shown_error(weight)])
        });
        let caption = format!("{} are the same", plural(difference.same_weights, "weight"));
        let head = ["weight", "A", "B", "relative error, |A - B|^2 / |B|^2"];
        page.section("Weights", &html::table(&caption, 3, head, rows));
    }
    if !difference.metadata.is_empty() {
        let rows = difference.metadata.iter().map(|(key, values)| {
            let [a, b] = values.each_ref().map(shown_value);
            [key.clone(), a, b].map(|cell| html::text(&cell))
        });
        page.section("Metadata", &html::table("Keys that differ", 3, ["key", "A", "B"], rows));
    }
    page.finish()
}
