//! Which initializer is which tensor of the model, and how it lies.
//!
//! Exporters rename, transpose and fuse weights, so an initializer's name is worth little. What a
//! weight belongs to is told, in this order, by the `name_scopes` of the node that takes it, by
//! that node's name, by its own name. Whether it lies as `[out, in]` or as `[in, out]` is told by
//! the node's operator, never by its shape: a square one would not say. Shapes are checked against
//! the configuration.

use std::{collections::HashMap, path::Path};

use super::{
    graph::{Graph, Initializer, Node},
    modules::{Module, Modules},
};
use crate::{
    FormatError, ModelConfig, Part, Result,
    arch::{Form, Tensor},
};

/// Where a slot's values are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Index of the initializer.
    pub initializer: usize,
    /// Whether it lies as `[out, in]`; so does a vector.
    pub rows_first: bool,
    /// The slot's first row in it; of a vector, its first value.
    pub first_row: usize,
    /// All of its rows or values.
    pub total_rows: usize,
}

/// How a node takes an initializer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Take {
    /// As a matrix `[out, in]`.
    RowsFirst,
    /// As a matrix `[in, out]`.
    ColumnsFirst,
    /// As what normalized values are multiplied with.
    Scale,
    /// As what is added to what a module gives.
    Bias,
    /// In a way that does not tell.
    Other,
}

/// An initializer, perhaps behind nodes that leave its values as they are.
#[derive(Debug, Clone, Copy)]
struct Value {
    initializer: usize,
    is_transposed: bool,
}

/// Operators of quantized graphs.
const QUANTIZED: [&str; 13] = [
    "DequantizeLinear",
    "QuantizeLinear",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "QLinearMatMul",
    "QGemm",
    "MatMulNBits",
    "MatMulBnb4",
    "MatMulFpQ4",
    "GatherBlockQuantized",
    "QMoE",
];

/// Finds the place of each tensor of the model, in the order of `modules.slots`.
///
/// An output projection that takes the embedding's initializer is left out.
///
/// # Errors
/// `Malformed` if two initializers stand for one tensor, or one has another shape than the
/// configuration says; `Unsupported` for a quantized graph, for a tensor that is not found, for a
/// matrix of a product that belongs to no module, and for what a module takes besides its weight.
pub fn find_weights(
    path: &Path,
    graph: &Graph<'_>,
    modules: &Modules,
    config: &mut ModelConfig,
) -> Result<Vec<(usize, Place)>> {
    let mut finder = Finder {
        path,
        graph,
        modules,
        values: HashMap::new(),
        places: vec![None; modules.slots.len()],
        stray: None,
    };
    for (index, initializer) in graph.initializers.iter().enumerate() {
        finder.define(initializer.name, Value { initializer: index, is_transposed: false })?;
    }
    for node in graph.nodes() {
        finder.visit(&node?)?;
    }
    finder.find_by_name_alone()?;
    finder.leave_out_tied_output(config);
    finder.finish(config.tied_embeddings)
}

struct Finder<'a, 'g> {
    path: &'a Path,
    graph: &'a Graph<'g>,
    modules: &'a Modules,
    /// By the names under which nodes take them.
    values: HashMap<&'g str, Value>,
    places: Vec<Option<Place>>,
    /// A matrix that is multiplied with, but belongs to no module.
    stray: Option<String>,
}

impl<'a, 'g> Finder<'a, 'g> {
    /// Enters a value under its name, which nothing else may have.
    fn define(&mut self, name: &'g str, value: Value) -> Result<()> {
        match self.values.insert(name, value) {
            None => Ok(()),
            Some(_) => Err(self.redefined(name)),
        }
    }

    fn redefined(&self, name: &str) -> FormatError {
        let place = format!("value `{name}`");
        FormatError::malformed(self.path, place, "", "a second definition", "one")
    }

    fn visit(&mut self, node: &Node<'g>) -> Result<()> {
        if QUANTIZED.contains(&node.op) {
            let what = format!("a quantized graph (node `{}`: `{}`)", node.name, node.op);
            let hint = "start from an export with fp16, bf16 or fp32 weights";
            return Err(FormatError::unsupported(self.path, what, hint));
        }
        if let Some(name) = node.outputs.iter().find(|&name| self.values.contains_key(name)) {
            return Err(self.redefined(name));
        }
        if let Some(value) = self.passed_on(node)?
            && let [output] = node.outputs[..]
        {
            return self.define(output, value);
        }
        for (position, input) in node.inputs.iter().enumerate() {
            if let Some(&value) = self.values.get(input) {
                self.enter(node, position, value)?;
            }
        }
        Ok(())
    }

    /// The value that a node gives if it leaves the values of an initializer as they are. A cast to
    /// fewer bits is taken for one: what is stored is the better source.
    fn passed_on(&self, node: &Node<'_>) -> Result<Option<Value>> {
        let Some(&value) = node.inputs.first().and_then(|input| self.values.get(input)) else {
            return Ok(None);
        };
        let is_matrix = self.graph.initializers[value.initializer].dims.len() == 2;
        Ok(match node.op {
            "Identity" | "Cast" => Some(value),
            "Transpose" if is_matrix && node.swaps_two_dimensions()? => {
                Some(Value { is_transposed: !value.is_transposed, ..value })
            }
            _ => None,
        })
    }

    /// Enters what a node that takes a value as its input `position` tells about it.
    fn enter(&mut self, node: &Node<'_>, position: usize, value: Value) -> Result<()> {
        let initializer = &self.graph.initializers[value.initializer];
        let module = module_of_node(self.modules, node)
            .or_else(|| module_of_name(self.modules, initializer.name));
        let (slots, biases): (&[usize], &[usize]) =
            module.map_or((&[], &[]), |module| (&module.weight, &module.bias));
        let (all, dims) = (&self.modules.slots, &initializer.dims);
        let take = self.take(node, position)?;
        match take {
            Take::RowsFirst | Take::ColumnsFirst if dims.len() == 2 && !slots.is_empty() => {
                let rows_first = (take == Take::RowsFirst) != value.is_transposed;
                self.place(slots, value.initializer, rows_first)
            }
            Take::Scale if dims.len() == 1 && dims[0] > 1 && is_vector(all, slots) => {
                self.place(slots, value.initializer, true)
            }
            Take::Bias if dims.len() == 1 && dims[0] > 1 && !biases.is_empty() => {
                self.place(biases, value.initializer, true)
            }
            Take::RowsFirst | Take::ColumnsFirst
                if node.op != "Gather" && dims.len() == 2 && dims.iter().all(|&dim| dim > 1) =>
            {
                let weight = described(initializer);
                self.stray.get_or_insert(format!("the matrix {weight} of node `{}`", node.name));
                Ok(())
            }
            // The weight itself, taken in a way that does not tell how it lies: its shape may.
            Take::Other | Take::Bias if self.slots_of(initializer).is_some() => Ok(()),
            _ if !slots.is_empty()
                && initializer.dtype().is_some()
                && initializer.elements() > Some(1) =>
            {
                let module = all[slots[0]].hf.name.trim_end_matches(".weight");
                let what = format!(
                    "{} as an input of node `{}` (`{}`) in the module `{module}`",
                    described(initializer),
                    node.name,
                    node.op
                );
                Err(FormatError::unsupported(self.path, what, ""))
            }
            _ => Ok(()),
        }
    }

    fn take(&self, node: &Node<'_>, position: usize) -> Result<Take> {
        Ok(match (node.op, position) {
            ("MatMul", 1) => Take::ColumnsFirst,
            ("Gemm", 1 | 2) => {
                for factor in ["alpha", "beta"] {
                    if node.float(factor)?.is_some_and(|factor| factor != 1.0) {
                        let what = format!("a factor in the product `{}`", node.name);
                        return Err(FormatError::unsupported(self.path, what, ""));
                    }
                }
                if position == 2 {
                    return Ok(Take::Bias);
                }
                match node.number("transB")? {
                    None | Some(0) => Take::ColumnsFirst,
                    Some(_) => Take::RowsFirst,
                }
            }
            ("Gather", 0) => Take::RowsFirst,
            ("Mul", _)
            | ("SimplifiedLayerNormalization" | "RMSNormalization" | "LayerNormalization", 1)
            | ("SkipSimplifiedLayerNormalization" | "SkipLayerNormalization", 2) => Take::Scale,
            ("Add", _) | ("LayerNormalization", 2) | ("SkipLayerNormalization", 3) => Take::Bias,
            _ => Take::Other,
        })
    }

    /// Puts slots, one above the other, at an initializer.
    fn place(&mut self, slots: &[usize], initializer: usize, rows_first: bool) -> Result<()> {
        let found = &self.graph.initializers[initializer];
        let expected = dims_of(&self.modules.slots, slots, rows_first);
        if found.dims != expected {
            return Err(self.other_shape(slots, found, &expected, rows_first));
        }
        let rows = |slot: usize| self.modules.slots[slot].dims[0];
        let total_rows = slots.iter().map(|&slot| rows(slot)).sum();
        let mut first_row = 0;
        for &slot in slots {
            let place = Place { initializer, rows_first, first_row, total_rows };
            match self.places[slot].replace(place) {
                Some(other) if other != place => {
                    let found = format!(
                        "{} and {}, taken in different ways",
                        described(&self.graph.initializers[other.initializer]),
                        described(found)
                    );
                    return Err(self.malformed_slot(slot, found, "one initializer".to_owned()));
                }
                _ => first_row += rows(slot),
            }
        }
        Ok(())
    }

    fn other_shape(
        &self,
        slots: &[usize],
        found: &Initializer<'_>,
        expected: &[u64],
        rows_first: bool,
    ) -> FormatError {
        let order = match (expected.len(), rows_first) {
            (1, _) => "",
            (_, true) => " (output channels first)",
            (_, false) => " (input channels first)",
        };
        let expected = format!("{expected:?}{order} by the configuration");
        self.malformed_slot(slots[0], described(found), expected)
    }

    fn malformed_slot(&self, slot: usize, found: String, expected: String) -> FormatError {
        let place = format!("`{}`", self.modules.slots[slot].hf.name);
        FormatError::malformed(self.path, place, "", found, expected)
    }

    /// Fills empty slots from initializers that bear their names, though no node tells how they
    /// lie: the shape must. Refuses the parameters of modules that the model does not have.
    fn find_by_name_alone(&mut self) -> Result<()> {
        let is_found: Vec<bool> = self.places.iter().map(Option::is_some).collect();
        for (index, initializer) in self.graph.initializers.iter().enumerate() {
            let Some(slots) = self.slots_of(initializer) else {
                if is_of_a_block(initializer.name) {
                    let blocks = self.modules.block_count;
                    let what =
                        format!("{} of a model with {blocks} blocks", described(initializer));
                    return Err(FormatError::unsupported(self.path, what, ""));
                }
                continue;
            };
            if slots.iter().any(|&slot| is_found[slot]) {
                continue;
            }
            if self.modules.slots[slots[0]].hf.form != Form::AsUsed {
                let what = described(initializer);
                let what = format!("{what}, of which no node tells whether 1 is added,");
                let hint = "export the model with its constants folded, or use its Hugging Face \
                            directory";
                return Err(FormatError::unsupported(self.path, what, hint));
            }
            let by_rows = dims_of(&self.modules.slots, slots, true);
            let by_columns = dims_of(&self.modules.slots, slots, false);
            if by_rows.len() == 2 && by_rows == by_columns && initializer.dims == by_rows {
                let what = described(initializer);
                let what = format!("{what}, of which no node tells whether it is transposed,");
                return Err(FormatError::unsupported(self.path, what, ""));
            }
            let rows_first = by_rows == by_columns || initializer.dims != by_columns;
            self.place(slots, index, rows_first)?;
        }
        Ok(())
    }

    /// The slots whose values an initializer has by its own name.
    fn slots_of(&self, initializer: &Initializer<'_>) -> Option<&'a [usize]> {
        let module = module_of_name(self.modules, initializer.name)?;
        let slots = match initializer.name.rsplit_once('.')?.1 {
            "weight" => &module.weight,
            "bias" => &module.bias,
            _ => return None,
        };
        (!slots.is_empty()).then_some(slots)
    }

    fn leave_out_tied_output(&mut self, config: &mut ModelConfig) {
        let index_of = |part| self.modules.slots.iter().position(|slot| slot.part == part);
        let place_of = |slot: Option<usize>| slot.and_then(|slot| self.places[slot]);
        let output = index_of(Part::Output);
        let shared =
            place_of(output).filter(|&output| place_of(index_of(Part::Embedding)) == Some(output));
        config.tied_embeddings |= shared.is_some();
        if let Some(output) = output.filter(|_| shared.is_some()) {
            self.places[output] = None;
        }
    }

    /// The places, if all are found that a model with or without tied embeddings needs.
    fn finish(self, is_tied: bool) -> Result<Vec<(usize, Place)>> {
        let mut found = Vec::with_capacity(self.places.len());
        for (index, (slot, place)) in self.modules.slots.iter().zip(&self.places).enumerate() {
            match place {
                Some(place) => found.push((index, *place)),
                None if is_tied && slot.part == Part::Output => {}
                None => return Err(self.missing(&slot.hf.name)),
            }
        }
        match self.stray {
            Some(stray) => Err(FormatError::unsupported(self.path, stray, "")),
            None => Ok(found),
        }
    }

    fn missing(&self, hf_name: &str) -> FormatError {
        let stray = match &self.stray {
            Some(stray) => format!("; {stray} is not known either;"),
            None => String::new(),
        };
        let what = format!(
            "a graph in which none of {} initializers is found to be `{hf_name}`{stray}",
            self.graph.initializers.len()
        );
        let hint = "names of initializers or nodes, or `name_scopes`, must hold the paths of \
                    modules, and nothing may be inside of `If` or of functions; export the model \
                    again, or use its Hugging Face directory";
        FormatError::unsupported(self.path, what, hint)
    }
}

/// What the paths in a node's metadata and in its name lead to.
fn module_of_node<'m>(modules: &'m Modules, node: &Node<'_>) -> Option<&'m Module> {
    // Written as a list of Python's: `['', 'model', 'model.norm', 'mul_4']`. The last one is the
    // operation's own name.
    let scopes = node.name_scopes.unwrap_or_default();
    let paths = scopes.rsplit('\'').skip(1).step_by(2).skip(1);
    let module = node.name.rsplit_once('/').map(|(module, _)| module);
    paths.chain(module).find_map(|path| modules.at(path))
}

/// What the path in an initializer's name leads to. The GenAI builder puts the operator before the
/// last word of it.
fn module_of_name<'m>(modules: &'m Modules, name: &str) -> Option<&'m Module> {
    let (module, _) = name.rsplit_once('.')?;
    let operators = [".MatMul", ".Add"];
    let module =
        operators.iter().find_map(|operator| module.strip_suffix(operator)).unwrap_or(module);
    modules.at(module)
}

/// Whether an initializer is by its own name a parameter of a module in a block.
fn is_of_a_block(name: &str) -> bool {
    (name.starts_with("layers.") || name.contains(".layers."))
        && (name.ends_with(".weight") || name.ends_with(".bias"))
}

/// The dimensions of slots that lie one above the other; of vectors, one behind the other.
fn dims_of(all: &[Tensor], slots: &[usize], rows_first: bool) -> Vec<u64> {
    let mut dims: Vec<u64> = all[slots[0]].dims.iter().map(|&dim| dim as u64).collect();
    dims[0] = slots.iter().map(|&slot| all[slot].dims[0] as u64).sum();
    if !rows_first {
        dims.reverse();
    }
    dims
}

/// Whether there is one slot, that of a vector.
fn is_vector(all: &[Tensor], slots: &[usize]) -> bool {
    matches!(slots, [slot] if all[*slot].dims.len() == 1)
}

fn described(initializer: &Initializer<'_>) -> String {
    format!("`{}` {:?}", initializer.name, initializer.dims)
}
