//! Several LoRAs into one: the options, their checks, and what the result is (PEFT's
//! `add_weighted_adapter`). The work for one module is in `lora`, pruning and merging in `prune`; a
//! LoRA for a dense delta is in `low_rank`, comparing two deltas in `diff`.

mod diff;
mod lora;
mod low_rank;
mod prune;

use std::str::FromStr;

pub use diff::{DeltaDiff, diff, diff_dense, norm};
pub use lora::{LoraFactors, combine_module};
pub use low_rank::{LowRank, LowRankFit, RankChoice, to_lora};
pub use prune::{Draw, Masks, SeededMasks};

use crate::linalg::LinalgError;

/// How adapters are combined, under PEFT's names. `Δ = s·B·A` is an adapter's delta, `w` its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CombinationType {
    /// The factors side by side: exactly `Σ w·Δ`, at the sum of the ranks.
    Cat,
    /// The weighted sums of `A` and of `B`, each with `√|w·s|`: cheap, but not the sum of the deltas.
    Linear,
    /// The best approximation to `Σ w·Δ` at the chosen rank.
    Svd,
    /// On `A` and `B`: prune by magnitude, elect a sign for every entry, merge what agrees with it.
    Ties,
    /// On `A` and `B`: prune at random, rescale, sum.
    DareLinear,
    /// On `A` and `B`: prune at random, rescale, elect signs, merge.
    DareTies,
    /// On `A` and `B`: prune by magnitude, sum.
    MagnitudePrune,
    /// [`Self::Ties`] on the deltas, then an SVD.
    TiesSvd,
    /// [`Self::DareLinear`] on the deltas, then an SVD.
    DareLinearSvd,
    /// [`Self::DareTies`] on the deltas, then an SVD.
    DareTiesSvd,
    /// [`Self::MagnitudePrune`] on the deltas, then an SVD.
    MagnitudePruneSvd,
}

impl CombinationType {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Cat,
        Self::Linear,
        Self::Svd,
        Self::Ties,
        Self::DareLinear,
        Self::DareTies,
        Self::MagnitudePrune,
        Self::TiesSvd,
        Self::DareLinearSvd,
        Self::DareTiesSvd,
        Self::MagnitudePruneSvd,
    ];

    /// PEFT's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cat => "cat",
            Self::Linear => "linear",
            Self::Svd => "svd",
            Self::Ties => "ties",
            Self::DareLinear => "dare_linear",
            Self::DareTies => "dare_ties",
            Self::MagnitudePrune => "magnitude_prune",
            Self::TiesSvd => "ties_svd",
            Self::DareLinearSvd => "dare_linear_svd",
            Self::DareTiesSvd => "dare_ties_svd",
            Self::MagnitudePruneSvd => "magnitude_prune_svd",
        }
    }

    /// Whether entries are pruned, so that a density is needed.
    pub fn prunes(self) -> bool {
        !matches!(self, Self::Cat | Self::Linear | Self::Svd)
    }

    /// Whether the result is a truncated SVD, whose rank can be chosen.
    pub fn truncates(self) -> bool {
        matches!(
            self,
            Self::Svd
                | Self::TiesSvd
                | Self::DareLinearSvd
                | Self::DareTiesSvd
                | Self::MagnitudePruneSvd
        )
    }
}

impl FromStr for CombinationType {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| {
                let names = Self::ALL.map(Self::name).join(", ");
                format!("combination type \"{name}\" is not known; choose one of {names}")
            })
    }
}

/// What decides the sign of an entry, under PEFT's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MajoritySign {
    /// The sign of the sum of the values.
    #[default]
    Total,
    /// The sign that more of the values have.
    Frequency,
}

impl FromStr for MajoritySign {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "total" => Ok(Self::Total),
            "frequency" => Ok(Self::Frequency),
            _ => Err(format!(
                "majority_sign_method \"{name}\" is not known; choose total or frequency"
            )),
        }
    }
}

/// What the user asks for; [`Self::plan`] checks it.
#[derive(Debug, Clone, PartialEq)]
pub struct CombineOptions {
    /// How the adapters are combined.
    pub kind: CombinationType,
    /// One weight an adapter; it may be negative.
    pub weights: Vec<f64>,
    /// The part of the entries that pruning keeps, above 0 and at most 1.
    pub density: Option<f64>,
    /// What decides the sign of an entry where signs are elected.
    pub majority_sign: MajoritySign,
    /// The rank of the result of an SVD; the largest rank of the adapters where it is not given.
    pub svd_rank: Option<usize>,
    /// The quantile of the factors' values to which those of an SVD are cut off, above 0 and at most 1.
    /// It looks at signed values, so it depends on the signs of the singular vectors: those of
    /// [`Svd`](crate::linalg::Svd) here, whatever LAPACK returns in PEFT.
    pub svd_clamp: Option<f64>,
}

impl CombineOptions {
    /// A combination with no further options.
    pub fn new(kind: CombinationType, weights: Vec<f64>) -> Self {
        Self {
            kind,
            weights,
            density: None,
            majority_sign: MajoritySign::default(),
            svd_rank: None,
            svd_clamp: None,
        }
    }

    /// Checks the options against the adapters, given as name and rank (the largest of `r` and of
    /// `rank_pattern`'s values), and says what will be done; or every problem. As in PEFT a single
    /// adapter is always combined linearly, whatever the type, so that nothing of it is lost.
    pub fn plan(&self, adapters: &[(&str, usize)]) -> Result<CombinePlan, Vec<String>> {
        let mut problems = Vec::new();
        if adapters.is_empty() {
            problems.push("no adapter is given; name at least one".to_owned());
        }
        if self.weights.len() != adapters.len() {
            problems.push(format!(
                "{} weights are given for {} adapters; give one for each",
                self.weights.len(),
                adapters.len()
            ));
        }
        for (i, weight) in self
            .weights
            .iter()
            .enumerate()
            .filter(|(_, w)| !w.is_finite())
        {
            problems.push(format!(
                "weight {} is {weight}; it must be a finite number",
                i + 1
            ));
        }
        let kind = if adapters.len() == 1 {
            CombinationType::Linear
        } else {
            self.kind
        };
        self.check_density(kind, &mut problems);
        self.check_svd(&mut problems);
        let ranks = || adapters.iter().map(|&(_, rank)| rank);
        let largest = ranks().max().unwrap_or(0);
        let rank = match kind {
            CombinationType::Cat => ranks().sum(),
            kind if kind.truncates() => self.svd_rank.unwrap_or(largest),
            _ => {
                if ranks().any(|rank| rank != largest) {
                    let list: Vec<String> = adapters
                        .iter()
                        .map(|(name, rank)| format!("{name}: {rank}"))
                        .collect();
                    problems.push(format!(
                        "{} needs adapters of one rank, but theirs differ ({}); use cat or svd",
                        kind.name(),
                        list.join(", ")
                    ));
                }
                largest
            }
        };
        if !problems.is_empty() {
            return Err(problems);
        }
        Ok(CombinePlan {
            kind,
            weights: self.weights.clone(),
            density: self.density.unwrap_or(1.0),
            majority_sign: self.majority_sign,
            svd_clamp: self.svd_clamp,
            rank,
        })
    }

    fn check_density(&self, kind: CombinationType, problems: &mut Vec<String>) {
        match self.density {
            None if kind.prunes() => problems.push(format!(
                "{} needs a density, the part of the entries to keep, above 0 and at most 1",
                kind.name()
            )),
            Some(_) if !self.kind.prunes() => problems.push(format!(
                "{} prunes nothing, so density has no effect; leave it out",
                self.kind.name()
            )),
            Some(density) if !(density > 0.0 && density <= 1.0) => {
                problems.push(format!(
                    "density is {density}; it must be above 0 and at most 1"
                ));
            }
            _ => {}
        }
    }

    fn check_svd(&self, problems: &mut Vec<String>) {
        let given = [
            ("svd_rank", self.svd_rank.is_some()),
            ("svd_clamp", self.svd_clamp.is_some()),
        ];
        for (name, _) in given
            .iter()
            .filter(|(_, given)| *given && !self.kind.truncates())
        {
            problems.push(format!(
                "{} uses no SVD, so {name} has no effect; leave it out",
                self.kind.name()
            ));
        }
        if self.svd_rank == Some(0) {
            problems.push("svd_rank is 0; it must be at least 1".to_owned());
        }
        if let Some(clamp) = self.svd_clamp.filter(|c| !(*c > 0.0 && *c <= 1.0)) {
            problems.push(format!(
                "svd_clamp is {clamp}; it must be above 0 and at most 1"
            ));
        }
    }
}

/// A checked combination.
///
/// The result's configuration is the first adapter's with `r` and `lora_alpha` both [`Self::rank`],
/// no `rank_pattern` or `alpha_pattern`, and the union of the target modules. Its scale is meant to be
/// 1, so `use_rslora` (which PEFT leaves as it was, making the scale `√r`) has to be off.
#[derive(Debug, Clone, PartialEq)]
pub struct CombinePlan {
    kind: CombinationType,
    weights: Vec<f64>,
    density: f64,
    majority_sign: MajoritySign,
    svd_clamp: Option<f64>,
    rank: usize,
}

impl CombinePlan {
    /// How the adapters are combined: linearly where there is only one.
    pub fn kind(&self) -> CombinationType {
        self.kind
    }

    /// The rank of the result in every module, and its `lora_alpha`.
    pub fn rank(&self) -> usize {
        self.rank
    }
}

/// What can go wrong in one module.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CombineError {
    /// Factors that do not go together.
    #[error("{module}: {}", .problems.join("; "))]
    Module {
        /// The module.
        module: String,
        /// Everything that differs.
        problems: Vec<String>,
    },
    /// A decomposition that failed.
    #[error("{module}: {source}")]
    Linalg {
        /// The module.
        module: String,
        /// Why.
        source: LinalgError,
    },
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_type_is_read_back_from_its_name_and_an_unknown_one_lists_them() {
        for kind in CombinationType::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
        }
        let error = "tie".parse::<CombinationType>().unwrap_err();
        assert!(
            error.contains("\"tie\"") && error.contains("ties, dare_linear"),
            "{error}"
        );
        assert_eq!("frequency".parse(), Ok(MajoritySign::Frequency));
        assert!("most".parse::<MajoritySign>().is_err());
    }

    #[test]
    fn the_rank_of_the_result_follows_from_the_type() {
        let adapters = [("a", 4), ("b", 4), ("c", 4)];
        let rank = |kind: CombinationType, svd_rank| {
            let density = kind.prunes().then_some(0.5);
            let base = CombineOptions::new(kind, vec![1.0; 3]);
            CombineOptions {
                density,
                svd_rank,
                ..base
            }
            .plan(&adapters)
            .unwrap()
            .rank()
        };
        for kind in CombinationType::ALL {
            let expected = if kind == CombinationType::Cat { 12 } else { 4 };
            assert_eq!(rank(kind, None), expected, "{}", kind.name());
            if kind.truncates() {
                assert_eq!(rank(kind, Some(7)), 7);
            }
        }
        let mixed = CombineOptions::new(CombinationType::Svd, vec![1.0; 2]);
        assert_eq!(mixed.plan(&[("a", 2), ("b", 8)]).unwrap().rank(), 8);
    }

    #[test]
    fn a_single_adapter_is_always_combined_linearly() {
        for kind in CombinationType::ALL {
            let plan = CombineOptions::new(kind, vec![0.5])
                .plan(&[("a", 3)])
                .unwrap();
            assert_eq!((plan.kind(), plan.rank()), (CombinationType::Linear, 3));
        }
    }

    #[test]
    fn all_problems_are_reported_at_once() {
        let options = CombineOptions {
            svd_rank: Some(0),
            svd_clamp: Some(2.0),
            ..CombineOptions::new(CombinationType::Ties, vec![1.0, f64::NAN, 1.0])
        };
        let problems = options.plan(&[("a", 2), ("b", 4)]).unwrap_err();
        let expected = [
            "3 weights are given for 2 adapters",
            "weight 2 is NaN",
            "ties needs a density",
            "ties uses no SVD, so svd_rank",
            "ties uses no SVD, so svd_clamp",
            "svd_rank is 0",
            "svd_clamp is 2",
            "a: 2, b: 4",
        ];
        assert_eq!(problems.len(), expected.len(), "{problems:#?}");
        for (problem, part) in problems.iter().zip(expected) {
            assert!(problem.contains(part), "{problem}");
        }
    }

    #[test]
    fn a_density_is_above_zero_and_at_most_one_and_only_given_where_something_is_pruned() {
        let plan = |kind, density| {
            let base = CombineOptions::new(kind, vec![1.0; 2]);
            CombineOptions {
                density: Some(density),
                ..base
            }
            .plan(&[("a", 2), ("b", 2)])
        };
        for density in [0.0, -0.5, 1.5, f64::NAN] {
            assert!(plan(CombinationType::DareTies, density).is_err());
        }
        assert!(plan(CombinationType::DareTies, 1.0).is_ok());
        assert!(plan(CombinationType::Cat, 0.5).unwrap_err()[0].contains("no effect"));
        let none = CombineOptions::new(CombinationType::Cat, vec![]).plan(&[]);
        assert!(none.unwrap_err()[0].contains("no adapter"));
    }
}
