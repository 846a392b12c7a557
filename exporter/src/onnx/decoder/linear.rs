//! Weight matrices in the graph: how they are stored, multiplied with, and looked up in.

use slim_formats::{DType, DenseTensor, Part, Weight, arch::Tensor};
use slim_kernels::weight;
use slim_runtime::find_weight;

use super::{
    super::{
        blocks::{Blocks, block_bytes},
        graph::{Attribute::Int, Element, Graph},
    },
    Builder, LEAST_BITS, PIECE, cast, f32_bytes, value_of,
};
use crate::{Result, tensor::to_bytes};

/// A weight matrix whose tensors are in the graph.
pub struct Stored {
    name: String,
    rows: usize,
    cols: usize,
    kind: Kind,
}

enum Kind {
    /// Tensors `NAME.codes [rows, row_blocks, bytes]`, `NAME.scales` and
    /// `NAME.offsets [rows, row_blocks]`.
    Blocks { bits: u8, block: usize, row_blocks: usize },
    /// Tensor `NAME [rows, cols]`, F16 or F32.
    Dense,
}

/// Tensors that a weight is stored as, at most.
pub const MAX_PARTS: u64 = 3;

/// Bytes of the tensors that [`Builder::store`] makes of a weight.
pub fn stored_bytes(found: Weight<'_>, least_bits: u8) -> u64 {
    let (rows, cols) = weight::shape(found);
    let weights = (rows * cols) as u64;
    match (found, found.bands()) {
        (_, Some(bands)) => {
            let (bits, block) = Blocks::bits_and_block(bands, least_bits);
            let codes = (rows * cols.next_multiple_of(block)) as u64;
            codes * u64::from(bits) / 8 + 2 * 4 * codes / block as u64
        }
        (Weight::Dense(DenseTensor { dtype: DType::F16, .. }), None) if rows > 1 => 2 * weights,
        (_, None) => 4 * weights,
    }
}

impl Builder<'_> {
    /// Writes a weight: a SliM layer with codes of at least `least_bits`, F16 as it is, anything
    /// else as f32.
    pub fn store(&mut self, tensor: &Tensor, least_bits: u8) -> Result<Stored> {
        let name = tensor.name.as_str();
        let (rows, cols) = tensor.shape();
        (self.on_tensor)(name);
        let found = find_weight(self.source, tensor)?;
        let kind = match (found, found.bands()) {
            (_, Some(bands)) => {
                let blocks = Blocks::new(bands, least_bits);
                let Blocks { bits, block, row_blocks, .. } = blocks;
                let dims = [rows, row_blocks, block_bytes(block, bits)];
                let part = |part: &str| format!("{name}.{part}");
                self.graph.tensor(&part("codes"), Element::U8, &dims, [Ok(blocks.codes)])?;
                for (name, values) in
                    [(part("scales"), blocks.scales), (part("offsets"), blocks.offsets)]
                {
                    let bytes = f32_bytes(&values);
                    self.graph.tensor(&name, Element::F32, &[rows, row_blocks], [Ok(bytes)])?;
                }
                Kind::Blocks { bits, block, row_blocks }
            }
            (_, None) => {
                let element = match found {
                    Weight::Dense(DenseTensor { dtype: DType::F16, .. }) => Element::F16,
                    _ => Element::F32,
                };
                let pieces = (0..rows).step_by(PIECE).map(|start| {
                    let rows = start..rows.min(start + PIECE);
                    let mut values = vec![0.0; rows.len() * cols];
                    weight::dequantize_rows(found, rows, &mut values)?;
                    Ok(match element {
                        Element::F16 => to_bytes(name, DType::F16, start, cols, &values)?,
                        _ => f32_bytes(&values),
                    })
                });
                self.graph.tensor(name, element, &[rows, cols], pieces)?;
                Kind::Dense
            }
        };
        Ok(Stored { name: name.to_owned(), rows, cols, kind })
    }

    /// What a layer makes of `input`, called like the layer: the product with its weight, and its
    /// bias.
    pub fn add_linear(&mut self, block: usize, part: Part, input: &str) -> Result<String> {
        let tensor = self.decoder.tensor(block, part);
        let stored = self.store(tensor, LEAST_BITS)?;
        let output = value_of(tensor);
        match self.bias_of(tensor) {
            None => self.multiply(&stored, input, output),
            Some(bias) => {
                let product = format!("{output}.product");
                self.multiply(&stored, input, &product);
                let bias = self.store_vector(bias)?;
                self.graph.node("Add", &[&product, &bias], &[output], &[]);
            }
        }
        Ok(output.to_owned())
    }

    /// `output = input * weight^T`.
    pub fn multiply(&mut self, weight: &Stored, input: &str, output: &str) {
        let Stored { name, rows, cols, kind } = weight;
        let part = |part: &str| format!("{name}.{part}");
        match *kind {
            Kind::Dense => {
                cast(self.graph, name, Element::F32, &part("f32"));
                self.multiply_dense(input, &part("f32"), output);
            }
            Kind::Blocks { bits, block, row_blocks } => {
                let sums = self.add_block_sums(input, *cols, [row_blocks, block]);
                let (scaled, shifted) = (format!("{output}.scaled"), format!("{output}.shifted"));
                self.graph.contrib_node(
                    "MatMulNBits",
                    &[input, &part("codes"), &part("scales")],
                    &[&scaled],
                    &[
                        ("K", Int(*cols as i64)),
                        ("N", Int(*rows as i64)),
                        ("bits", Int(bits.into())),
                        ("block_size", Int(block as i64)),
                        ("accuracy_level", Int(accuracy_level(bits))),
                    ],
                );
                self.multiply_dense(&sums, &part("offsets"), &shifted);
                self.graph.node("Add", &[&scaled, &shifted], &[output], &[]);
            }
        }
    }

    fn multiply_dense(&mut self, input: &str, weight: &str, output: &str) {
        self.graph.contrib_node("FusedMatMul", &[input, weight], &[output], &[("transB", Int(1))]);
    }

    /// The sums of `input` over each block of columns: `[batch, sequence, row_blocks]`.
    fn add_block_sums(
        &mut self,
        input: &str,
        cols: usize,
        [row_blocks, block]: [usize; 2],
    ) -> String {
        let sums = format!("{input}.sums_of_{block}");
        if self.made.insert(sums.clone()) {
            let part = |part: &str| format!("{sums}.{part}");
            let (shape, blocks, whole) = (part("shape"), part("blocks"), part("whole"));
            let missing = row_blocks * block - cols;
            if missing > 0 {
                let pads = part("pads");
                self.graph.integers(&pads, &[0, 0, 0, 0, 0, missing as i64], false);
                self.graph.node("Pad", &[input, &pads], &[&whole], &[]);
            }
            let input = if missing > 0 { &whole } else { input };
            self.graph.integers(&shape, &[0, 0, row_blocks as i64, block as i64], false);
            self.graph.node("Reshape", &[input, &shape], &[&blocks], &[]);
            self.graph.node(
                "ReduceSum",
                &[&blocks, "last_axis"],
                &[&sums],
                &[("keepdims", Int(0))],
            );
        }
        sums
    }

    /// The rows of a table that `ids` name.
    pub fn look_up(&mut self, table: &Stored, ids: &str, output: &str) {
        let graph = &mut *self.graph;
        let name = &table.name;
        let part = |part: &str| format!("{name}.{part}");
        match table.kind {
            Kind::Dense => {
                let rows = gather_rows(graph, name, ids);
                cast(graph, &rows, Element::F32, output);
            }
            Kind::Blocks { block, row_blocks, .. } => {
                let codes = gather_rows(graph, &part("codes"), ids);
                let [scales, offsets] = ["scales", "offsets"].map(|name| {
                    let rows = gather_rows(graph, &part(name), ids);
                    let column = part(&format!("{name}.column"));
                    graph.node("Unsqueeze", &[&rows, "last_axis"], &[&column], &[]);
                    column
                });
                let [middle, values, centered, scaled, blocks, shape, whole, ends] =
                    ["middle", "values", "centered", "scaled", "blocks", "shape", "whole", "ends"]
                        .map(part);
                graph.integers(&part("middle.i64"), &[128], true);
                cast(graph, &part("middle.i64"), Element::F32, &middle);
                cast(graph, &codes, Element::F32, &values);
                graph.node("Sub", &[&values, &middle], &[&centered], &[]);
                graph.node("Mul", &[&centered, &scales], &[&scaled], &[]);
                graph.node("Add", &[&scaled, &offsets], &[&blocks], &[]);
                let stored = row_blocks * block;
                let is_padded = stored > table.cols;
                graph.integers(&shape, &[0, 0, stored as i64], false);
                let row = if is_padded { &whole } else { output };
                graph.node("Reshape", &[&blocks, &shape], &[row], &[]);
                if is_padded {
                    graph.integers(&part("start"), &[0], false);
                    graph.integers(&ends, &[table.cols as i64], false);
                    let inputs = [row, &part("start"), &ends, "last_axis"];
                    graph.node("Slice", &inputs, &[output], &[]);
                }
            }
        }
    }
}

/// How `MatMulNBits` treats its inputs: level 0 leaves them as they are, level 4 rounds them to 8
/// bits per block.
///
/// ONNX Runtime's CPU kernels (1.32) multiply unrounded inputs with 4-bit codes only; with others,
/// they would dequantize the whole layer for every token.
fn accuracy_level(bits: u8) -> i64 {
    if bits == 4 { 0 } else { 4 }
}

/// The rows of `tensor` that `ids` name.
fn gather_rows(graph: &mut Graph, tensor: &str, ids: &str) -> String {
    let rows = format!("{tensor}.of_input");
    graph.node("Gather", &[tensor, ids], &[&rows], &[("axis", Int(0))]);
    rows
}
