//! OLMo 2 and 3: norms behind attention and network only, queries and keys normed as a whole. OLMo
//! 3 has windows.

use super::{
    BlockSpec, Family, HfType, Norms, QkNorm, llama,
    llama_cpp::{self, Ability},
};
use crate::{ModelConfig, Result, config::Keys};

/// `olmo2` and `olmo3`.
#[derive(Debug)]
pub struct Olmo;

const OLMO2: HfType = HfType { model_type: "olmo2", class: "Olmo2ForCausalLM" };
const OLMO3: HfType = HfType { model_type: "olmo3", class: "Olmo3ForCausalLM" };

impl Family for Olmo {
    fn architecture(&self) -> &'static str {
        "olmo2"
    }

    fn hf_types(&self) -> &'static [HfType] {
        &[OLMO2, OLMO3]
    }

    fn hf_type(&self, config: &ModelConfig) -> HfType {
        if config.sliding_window.is_some() { OLMO3 } else { OLMO2 }
    }

    fn has_local_rope(&self) -> bool {
        true
    }

    fn read(&self, keys: &dyn Keys, config: &mut ModelConfig) -> Result<()> {
        llama::read_attention_bias(keys, config)?;
        match keys.model_type() == Some(OLMO2.model_type) {
            true => Ok(()),
            false => llama::read_windows(keys, config, 4),
        }
    }

    fn write(&self, config: &ModelConfig, json: &mut serde_json::Value) {
        if config.sliding_window.is_some() {
            llama::write_windows(config, json);
        }
    }

    fn in_llama_cpp(&self, config: &ModelConfig) -> Option<ModelConfig> {
        Some(llama_cpp::computed(config, &[Ability::Windows]))
    }

    fn block(&self, config: &ModelConfig, index: usize) -> BlockSpec {
        let mut spec = llama::block(config, index);
        spec.norms = Norms::Behind;
        spec.attends(|attention| attention.qk_norm = Some(QkNorm::Whole));
        spec
    }
}
