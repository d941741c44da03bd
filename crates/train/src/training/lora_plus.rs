//! LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B learns at a rate of its own.
//!
//! Groups as in PEFT's `create_loraplus_optimizer`: B and whatever has one axis at `ratio` times the rate,
//! an embedding's factors at a rate of their own, everything else at the rate itself.

use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::module::{ParamGroup, ParamId};
use enamel_adapter::for_each_trainable;
use enamel_model::Model;

use crate::recipe::TrainSettings;
use crate::training::lr_schedule::Schedule;

/// The schedules of all groups; `at_rate` makes one from its highest rate.
pub fn scheduler(
    model: &Model,
    settings: &TrainSettings,
    ratio: f64,
    at_rate: &dyn Fn(f64) -> Schedule,
) -> ModuleLrScheduler {
    let (mut fast, mut embedding) = (Vec::new(), Vec::new());
    for_each_trainable(
        model,
        &mut |key, param| match group(key, param.shape().len()) {
            Group::Fast => fast.push(param.id()),
            Group::Embedding => embedding.push(param.id()),
            Group::Plain => {}
        },
    );
    let mut all: ModuleLrScheduler = at_rate(settings.learning_rate).into();
    let mut add = |ids: Vec<ParamId>, rate| {
        if !ids.is_empty() {
            all = all
                .clone()
                .with_group(ParamGroup::from_ids(ids), at_rate(rate));
        }
    };
    add(fast, settings.learning_rate * ratio);
    add(embedding, settings.loraplus_lr_embedding);
    all
}

#[derive(Debug, PartialEq)]
enum Group {
    Fast,
    Embedding,
    Plain,
}

fn group(key: &str, axes: usize) -> Group {
    // As in PEFT, the module that holds an embedding's factors counts, before their names do.
    if key.contains("lora_embedding_") {
        Group::Embedding
    } else if key.contains("lora_B") || axes == 1 {
        Group::Fast
    } else {
        Group::Plain
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_pefts() {
        let key = |own: &str| format!("base_model.model.model.layers.0.self_attn.q_proj.{own}");
        assert_eq!(group(&key("lora_A.weight"), 2), Group::Plain);
        assert_eq!(group(&key("lora_B.weight"), 2), Group::Fast);
        assert_eq!(group(&key("lora_magnitude_vector"), 1), Group::Fast);
        assert_eq!(group(&key("base_layer.bias"), 1), Group::Fast);
        assert_eq!(
            group("base_model.model.model.embed_tokens.lora_embedding_B", 2),
            Group::Embedding
        );
        assert_eq!(group("base_model.model.lm_head.weight", 2), Group::Plain);
    }
}
