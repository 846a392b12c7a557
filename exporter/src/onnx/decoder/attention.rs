//! Attention in the graph.

use slim_formats::{
    Part,
    arch::{Attention, Norm, QkNorm, QueryScaling},
};

use super::{
    super::graph::{
        Attribute::{Float, Int},
        Dim::{Fixed, Named},
        Element,
    },
    Builder, cast, rope_tables, value_of,
};
use crate::Result;

/// `GroupQueryAttention` turns queries and keys if so many channels divide a head and what is
/// turned of it; elsewhere `RotaryEmbedding` turns them before.
const TURNED_MULTIPLE: usize = 16;

impl Builder<'_> {
    /// Attention of block `block`, its output projection included.
    pub fn add_attention(&mut self, block: usize, input: &str) -> Result<String> {
        let attention = self.decoder.blocks[block].attention();
        let attention = *attention.expect("`lacks` refuses other mixers");
        let Attention { heads, kv_heads, head_dim, window, rope, rotated, scale, .. } = attention;
        let mut q = self.add_linear(block, Part::AttnQ, input)?;
        let mut k = self.add_linear(block, Part::AttnK, input)?;
        let v = self.add_linear(block, Part::AttnV, input)?;
        if let Some(norm) = attention.qk_norm {
            q = self.add_qk_norm(block, norm, Part::AttnQNorm, &q, heads)?;
            k = self.add_qk_norm(block, norm, Part::AttnKNorm, &k, kv_heads)?;
        }
        if let Some(scaling) = attention.query_scaling {
            q = self.scale_queries(&q, scaling);
        }
        let is_turned_here =
            [head_dim, rotated].iter().any(|channels| !channels.is_multiple_of(TURNED_MULTIPLE));
        if let Some(rope) = rope.filter(|_| is_turned_here) {
            q = self.turn(&q, rope, heads, rotated);
            k = self.turn(&k, rope, kv_heads, rotated);
        }

        let (past, present) = (Named("past_sequence"), Named("total_sequence"));
        let [past_key, past_value] =
            ["key", "value"].map(|part| format!("past_key_values.{block}.{part}"));
        let [present_key, present_value] =
            ["key", "value"].map(|part| format!("present.{block}.{part}"));
        let dims = |length| [Named("batch"), Fixed(kv_heads), length, Fixed(head_dim)];
        for (past_name, present_name) in [(&past_key, &present_key), (&past_value, &present_value)]
        {
            self.graph.input(past_name, Element::F32, &dims(past));
            self.graph.output(present_name, Element::F32, &dims(present));
        }
        let attended = format!("blk.{block}.attended");
        let tables = rope.filter(|_| !is_turned_here).map(rope_tables);
        let window = window.map_or(-1, |window| window as i64);
        let mut attributes = vec![
            ("num_heads", Int(heads as i64)),
            ("kv_num_heads", Int(kv_heads as i64)),
            ("do_rotary", Int(tables.is_some().into())),
            ("local_window_size", Int(window)),
        ];
        if scale != 1.0 / (head_dim as f32).sqrt() {
            attributes.push(("scale", Float(scale)));
        }
        attributes.extend(attention.softcap.map(|softcap| ("softcap", Float(softcap))));
        let mut inputs =
            vec![&*q, &k, &v, &past_key, &past_value, "last_positions", "total_length"];
        inputs.extend(tables.iter().flatten().map(String::as_str));
        let outputs = [&*attended, &present_key, &present_value];
        self.graph.contrib_node("GroupQueryAttention", &inputs, &outputs, &attributes);
        self.add_linear(block, Part::AttnOutput, &attended)
    }

    /// The norm `part` of queries or keys.
    fn add_qk_norm(
        &mut self,
        block: usize,
        norm: QkNorm,
        part: Part,
        input: &str,
        heads: usize,
    ) -> Result<String> {
        let tensor = self.decoder.tensor(block, part);
        let output = value_of(tensor);
        if norm == QkNorm::Whole {
            self.add_norm_as(Norm::Rms, input, tensor, output)?;
            return Ok(output.to_owned());
        }
        let [by_head, normed, split, joined] =
            ["by_head", "normed", "split", "joined"].map(|part| format!("{output}.{part}"));
        let head_dim = tensor.dims[0];
        self.graph.integers(&split, &[0, 0, heads as i64, head_dim as i64], false);
        self.graph.node("Reshape", &[input, &split], &[&by_head], &[]);
        self.add_norm_as(Norm::Rms, &by_head, tensor, &normed)?;
        self.graph.integers(&joined, &[0, 0, (heads * head_dim) as i64], false);
        self.graph.node("Reshape", &[&normed, &joined], &[output], &[]);
        Ok(output.to_owned())
    }

    /// Queries times what their positions say. That they are turned later makes no difference.
    fn scale_queries(&mut self, q: &str, scaling: QueryScaling) -> String {
        let QueryScaling { beta, context } = scaling;
        let scales = format!("query_scales.{beta}.{context}");
        if self.made.insert(scales.clone()) {
            let positions = self.positions();
            let part = |part: &str| format!("{scales}.{part}");
            let [context_name, one, step, steps, next, logarithm, growth, flat] =
                ["context", "one", "step", "steps", "next", "logarithm", "growth", "flat"]
                    .map(part);
            self.graph.integers(&context_name, &[context as i64], true);
            self.graph.float(&one, 1.0);
            self.graph.node("Div", &[positions, &context_name], &[&step], &[]);
            cast(self.graph, &step, Element::F32, &steps);
            self.graph.node("Add", &[&steps, &one], &[&next], &[]);
            self.graph.node("Log", &[&next], &[&logarithm], &[]);
            self.scale(&logarithm, beta, &growth);
            self.graph.node("Add", &[&growth, &one], &[&flat], &[]);
            self.graph.node("Unsqueeze", &[&flat, "last_axis"], &[&scales], &[]);
        }
        let grown = format!("{q}.grown");
        self.graph.node("Mul", &[q, &scales], &[&grown], &[]);
        grown
    }

    /// Queries or keys of `heads` heads, turned by rotary embedding `rope`.
    fn turn(&mut self, input: &str, rope: usize, heads: usize, rotated: usize) -> String {
        let positions = self.positions();
        let [cos, sin] = rope_tables(rope);
        let turned = format!("{input}.turned");
        let attributes =
            [("num_heads", Int(heads as i64)), ("rotary_embedding_dim", Int(rotated as i64))];
        let inputs = [input, positions, &cos, &sin];
        self.graph.contrib_node("RotaryEmbedding", &inputs, &[&turned], &attributes);
        turned
    }
}
