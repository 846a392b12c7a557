//! The report of `inspect --html`.

use std::{collections::BTreeMap, fmt::Write as _};

use serde_json::json;
use slim_formats::slim::{Fault, LayerInfo};

use super::{
    contents::Contents,
    text::{self, mean_width, preview, short_name},
};
use crate::{
    html::{self, Page},
    output::{count, plural, size},
};

/// The widths that there are.
const WIDTHS: std::ops::RangeInclusive<u8> = 1..=8;

/// The page about a file, `name`, with the faults that were found in it.
pub fn report(contents: &Contents, name: &str, faults: &[Fault]) -> String {
    let architecture = contents.architecture.as_deref().unwrap_or("unknown architecture");
    let lead = format!(
        "{architecture}, {}, {} parameters",
        size(contents.file_bytes),
        count(contents.parameters())
    );
    let mut page = Page::new(name, &lead);
    page.section("Summary", &html::facts(&text::summary_facts(contents)));
    page.section("Checks", &verdict(contents, faults));
    let matrices = matrices(contents.layers());
    if !matrices.is_empty() {
        let maps = format!("{}{}{}", legend(), maps(contents, &matrices), layer_table(contents));
        page.section("Bit-widths", &maps);
        page.section("Widths by kind of layer", &kinds(&matrices));
        page.section("Errors", &errors(contents.layers()));
    }
    let provenance = text::provenance_facts(contents);
    if !provenance.is_empty() {
        page.section("Where it comes from", &html::facts(&provenance));
    }
    page.section("Tensors", &html::details("All tensors", &tensors(contents)));
    page.section("Metadata", &metadata(contents));
    page.finish()
}

fn verdict(contents: &Contents, faults: &[Fault]) -> String {
    if faults.is_empty() {
        return format!("<p class=\"ok\">{}</p>\n", html::text(text::no_faults(contents).trim()));
    }
    let rows = faults.iter().map(|fault| {
        let Fault { rule, place, found, expected } = fault;
        [place, found, expected, &(*rule).to_owned()].map(|cell| html::text(cell))
    });
    format!("<p class=\"no\">{}</p>\n", html::text(&plural(faults.len(), "fault")))
        + &html::table("Broken rules", 4, ["place", "found", "expected", "rule"], rows)
}

/// The layers of a matrix: itself, or its bands.
struct Matrix<'a> {
    /// The number of its block.
    block: Option<usize>,
    /// What it is in its block, or in the model.
    kind: &'a str,
    layers: Vec<&'a LayerInfo>,
}

/// The matrices of a layer table, in its order.
fn matrices(layers: &[LayerInfo]) -> Vec<Matrix<'_>> {
    let mut matrices: Vec<Matrix<'_>> = Vec::new();
    for layer in layers {
        let name = layer.name.split_once(".weight").map_or(&layer.name[..], |(name, _)| name);
        let of_block = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        let in_block = of_block.and_then(|(block, kind)| Some((block.parse().ok()?, kind)));
        let (block, kind) = match in_block {
            Some((block, kind)) => (Some(block), kind),
            None => (None, name),
        };
        match matrices.last_mut().filter(|last| (last.block, last.kind) == (block, kind)) {
            Some(matrix) => matrix.layers.push(layer),
            None => matrices.push(Matrix { block, kind, layers: vec![layer] }),
        }
    }
    matrices
}

fn legend() -> String {
    let entry = |bits| format!("<li><i class=\"b{bits}\"></i>{}</li>", plural(bits, "bit"));
    let entries: String = WIDTHS.map(usize::from).map(entry).collect();
    format!("<ul class=\"legend\">{entries}</ul>\n")
}

/// A map of each matrix: blocks down, kinds across.
fn maps(contents: &Contents, matrices: &[Matrix<'_>]) -> String {
    let mut html = String::new();
    let (in_blocks, others): (Vec<_>, Vec<_>) =
        matrices.iter().partition(|matrix| matrix.block.is_some());
    for matrix in others {
        let _ = write!(html, "<h3>{}</h3>{}", html::text(matrix.kind), map(contents, matrix));
    }
    let mut kinds: Vec<&str> = Vec::new();
    let mut blocks: BTreeMap<Option<usize>, BTreeMap<&str, &Matrix<'_>>> = BTreeMap::new();
    for matrix in in_blocks {
        if !kinds.contains(&matrix.kind) {
            kinds.push(matrix.kind);
        }
        blocks.entry(matrix.block).or_default().insert(matrix.kind, matrix);
    }
    html += "<div class=\"scroll maps\" tabindex=\"0\" role=\"region\" aria-label=\"Bit-widths of \
             each matrix\"><table><caption>Groups of columns from left to right, rows from the top \
             down. Point at a map to see a group.</caption>\n<thead><tr><th scope=\"col\">block\
             </th>";
    for kind in &kinds {
        let _ = write!(html, "<th scope=\"col\">{}</th>", html::text(kind));
    }
    html += "</tr></thead>\n<tbody>\n";
    for (block, of_block) in blocks {
        let _ = write!(html, "<tr><th scope=\"row\">{}</th>", block.unwrap_or_default());
        for kind in &kinds {
            let map = of_block.get(kind).map(|matrix| map(contents, matrix)).unwrap_or_default();
            let _ = write!(html, "<td>{map}</td>");
        }
        html += "</tr>\n";
    }
    html + "</tbody></table></div>\n"
}

/// A picture of a matrix: columns in groups, rows in bands, a colour for each width.
fn map(contents: &Contents, matrix: &Matrix<'_>) -> String {
    let layers = &matrix.layers;
    let rows: usize = layers.iter().map(|layer| layer.layout.rows()).sum();
    let groups = layers.iter().map(|layer| layer.layout.groups().len()).max().unwrap_or(0);
    let mut areas = vec![String::new(); usize::from(*WIDTHS.end()) + 1];
    let (mut top, mut told) = (0, Vec::new());
    for layer in layers {
        let (height, digits) = (layer.layout.rows(), digits(layer));
        for (first, run) in runs(digits.as_bytes()) {
            let area = &mut areas[usize::from(digits.as_bytes()[first] - b'0')];
            let _ = write!(area, "M{first} {top}h{run}v{height}h-{run}z");
        }
        top += height;
        told.push(json!([short_name(layer), height, digits, about(contents, layer)]));
    }
    let paths: String = areas
        .iter()
        .enumerate()
        .filter(|(_, area)| !area.is_empty())
        .map(|(bits, area)| format!("<path class=\"b{bits}\" d=\"{area}\"/>"))
        .collect();
    let bits: f64 = layers.iter().map(|layer| mean_width(layer) * layer.layout.rows() as f64).sum();
    let label = format!("{:.2} bits in the mean", bits / rows.max(1) as f64);
    format!(
        "<svg class=\"map\" role=\"img\" aria-label=\"{}\" viewBox=\"0 0 {groups} {rows}\" \
         preserveAspectRatio=\"none\" shape-rendering=\"crispEdges\" data-group-size=\"{}\" \
         data-layers=\"{}\">{paths}</svg>",
        html::text(&label),
        layers.first().map_or(0, |layer| layer.layout.group_size()),
        html::text(&json!(told).to_string()),
    )
}

/// Places where equal bytes begin, and how many there are.
fn runs(bytes: &[u8]) -> impl Iterator<Item = (usize, usize)> {
    let mut first = 0;
    bytes.chunk_by(|a, b| a == b).map(move |run| {
        let at = first;
        first += run.len();
        (at, run.len())
    })
}

/// A digit per group.
fn digits(layer: &LayerInfo) -> String {
    layer.layout.groups().iter().map(|group| group.bit_width.bits().to_string()).collect()
}

/// What a map tells about a layer.
fn about(contents: &Contents, layer: &LayerInfo) -> String {
    let mut told = format!("In the layer: {:.2} bits in the mean", mean_width(layer));
    if let Some(error) = layer.error {
        let _ = write!(told, ", output error {error:.5}");
    }
    if let Some((least, most)) = contents.scale_range(&layer.name) {
        let _ = write!(told, ", scales {least:.1e} to {most:.1e}");
    }
    told + "."
}

/// What the maps show, for who cannot see them.
fn layer_table(contents: &Contents) -> String {
    let rows = contents.layers().iter().map(|layer| {
        let layout = &layer.layout;
        [
            html::text(&short_name(layer)),
            format!("<span class=\"digits\">{}</span>", digits(layer)),
            format!("{} x {}", count(layout.rows() as u64), count(layout.cols() as u64)),
            format!("{:.2}", mean_width(layer)),
            layer.error.map_or("-".to_owned(), |error| format!("{error:.5}")),
        ]
    });
    let head = ["layer", "width of each group", "shape", "mean width", "output error"];
    html::details("The same as a table", &html::table("Layers", 2, head, rows))
}

/// The share of each width in each kind of matrix.
fn kinds(matrices: &[Matrix<'_>]) -> String {
    let mut kinds: Vec<(&str, [usize; 9])> = Vec::new();
    for matrix in matrices {
        let at = kinds.iter().position(|(kind, _)| *kind == matrix.kind).unwrap_or_else(|| {
            kinds.push((matrix.kind, [0; 9]));
            kinds.len() - 1
        });
        for layer in &matrix.layers {
            for group in layer.layout.groups() {
                kinds[at].1[usize::from(group.bit_width.bits())] +=
                    group.cols.len() * layer.layout.rows();
            }
        }
    }
    let rows = kinds.iter().map(|(kind, weights)| {
        let total = weights.iter().sum::<usize>().max(1) as f64;
        let (mut bar, mut shares, mut bits) = (String::new(), Vec::new(), 0.0);
        for width in WIDTHS {
            let share = weights[usize::from(width)] as f64 / total;
            bits += share * f64::from(width);
            if share > 0.0 {
                let _ = write!(bar, "<span class=\"b{width}\" style=\"flex:{share:.4}\"></span>");
                shares.push(format!("{width}: {:.0} %", 100.0 * share));
            }
        }
        [
            html::text(kind),
            format!("<span class=\"share\">{bar}</span>"),
            html::text(&shares.join(", ")),
            format!("{bits:.2}"),
        ]
    });
    let head = ["kind", "shares", "of each width", "mean width"];
    html::table("Weights by width, bits of codes alone", 3, head, rows)
}

/// The layers with the largest errors.
fn errors(layers: &[LayerInfo]) -> String {
    const SHOWN: usize = 20;
    let mut known: Vec<_> = layers.iter().filter_map(|layer| Some((layer, layer.error?))).collect();
    if known.is_empty() {
        return "<p>Not measured, or trained since.</p>\n".to_owned();
    }
    known.sort_by(|a, b| b.1.total_cmp(&a.1));
    let largest = known[0].1.max(f32::MIN_POSITIVE);
    let rows = known.iter().take(SHOWN).map(|(layer, error)| {
        let share = 100.0 * error / largest;
        [
            html::text(&short_name(layer)),
            format!("<span class=\"bar\" style=\"width:{share:.1}%\"></span>"),
            format!("{:.2}", mean_width(layer)),
            format!("{error:.5}"),
        ]
    });
    let caption = format!(
        "Relative output error on the calibration text, the largest {} of {}",
        SHOWN.min(known.len()),
        known.len()
    );
    html::table(&caption, 2, ["layer", "share of the largest", "mean width", "error"], rows)
}

fn tensors(contents: &Contents) -> String {
    let rows = contents.tensors.iter().map(|tensor| {
        let shape = tensor.shape.iter().map(|&dim| count(dim)).collect::<Vec<_>>().join(" x ");
        [html::text(&tensor.name), html::text(&tensor.dtype), shape, count(tensor.bytes)]
    });
    html::table("Tensors as the file lists them", 2, ["tensor", "type", "shape", "bytes"], rows)
}

fn metadata(contents: &Contents) -> String {
    let rows = contents.metadata.iter().map(|(key, value)| {
        [format!("<code>{}</code>", html::text(key)), html::text(&preview(value))]
    });
    "<label>Search <input type=\"search\"></label>\n".to_owned()
        + &html::table("Keys of the file", 2, ["key", "value"], rows)
}
