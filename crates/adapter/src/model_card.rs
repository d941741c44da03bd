//! README.md of an adapter directory: Hugging Face's model card.

use std::fmt::Write;

use serde_json::json;

use crate::config::LoraConfig;
use crate::plan::AdapterPlan;

/// What an adapter directory says about its origin.
#[derive(Clone, Debug, Default)]
pub struct SaveMeta {
    /// The base model's name or directory.
    pub base_model_name_or_path: Option<String>,
    /// The base model's revision.
    pub revision: Option<String>,
    /// `CAUSAL_LM` for a language model.
    pub task_type: Option<String>,
    /// Markdown to put at the end of the model card.
    pub extra_readme: Option<String>,
}

pub(crate) fn model_card(config: &LoraConfig, plan: &AdapterPlan, meta: &SaveMeta) -> String {
    let mut card = String::from("---\n");
    let mut line = |text: String| {
        card.push_str(&text);
        card.push('\n');
    };
    if let Some(base) = &config.base_model_name_or_path {
        // A JSON string is a YAML string, whatever is in it.
        line(format!("base_model: {}", json!(base)));
    }
    line("library_name: peft".into());
    if config.task_type.as_deref() == Some("CAUSAL_LM") {
        line("pipeline_tag: text-generation".into());
    }
    line("tags:\n- lora\n- enamel\n---\n".into());
    let base = config
        .base_model_name_or_path
        .as_deref()
        .unwrap_or("its base model");
    line(format!("# LoRA adapter for {base}\n"));
    line(format!(
        "{} trained parameters ({:.4} % of {}), in {} adapted modules{}.\n",
        plan.trainable,
        plan.percent(),
        plan.total,
        plan.targets.len(),
        match plan.saved.len() {
            0 => String::new(),
            count => format!(" and {count} saved whole"),
        }
    ));
    let rank = if config.rank_pattern.is_empty() {
        ""
    } else {
        " (others by rank_pattern)"
    };
    let alpha = if config.alpha_pattern.is_empty() {
        ""
    } else {
        " (others by alpha_pattern)"
    };
    line(format!("- r: {}{rank}", config.r));
    line(format!("- lora_alpha: {}{alpha}", config.lora_alpha));
    line(format!("- lora_dropout: {}", config.lora_dropout));
    line(format!("- use_rslora: {}\n", config.use_rslora));
    line("## Use\n\nWith Enamel:\n".into());
    let reference = config.base_model_name_or_path.as_deref().unwrap_or("BASE");
    line(format!(
        "```sh\nenamel chat --model {reference:?} --adapter THIS_DIRECTORY\n```\n"
    ));
    line("With PEFT:\n".into());
    let revision = config
        .revision
        .as_ref()
        .map_or(String::new(), |r| format!(", revision={}", json!(r)));
    line(format!(
        "```python\nfrom transformers import AutoModelForCausalLM\nfrom peft import PeftModel\n\n\
         base = AutoModelForCausalLM.from_pretrained({}{revision})\n\
         model = PeftModel.from_pretrained(base, \"THIS_DIRECTORY\")\n```",
        json!(reference)
    ));
    if let Some(extra) = &meta.extra_readme {
        let _ = write!(card, "\n{}\n", extra.trim_end());
    }
    card
}
