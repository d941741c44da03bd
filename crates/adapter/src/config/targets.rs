//! Which modules are meant: PEFT's three notations in one type.

use serde::{Deserialize, Serialize};

/// What PEFT writes where a configuration adapts no module and only trains others whole
/// (`DUMMY_TARGET_MODULES` in `utils/constants.py`).
const NONE: &str = "dummy-target-modules";

/// Which modules are meant: PEFT's string (a regular expression, or `all-linear`) or list of names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "TargetsForm", into = "TargetsForm")]
pub enum Targets {
    /// Every linear layer but the one that yields logits.
    AllLinear,
    /// No module: only what `modules_to_save` names is trained.
    Nothing,
    /// Modules whose whole name matches.
    Regex(String),
    /// Modules with one of these names, or a name that ends in a dot and one of these.
    List(Vec<String>),
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum TargetsForm {
    One(String),
    Many(Vec<String>),
}

impl From<TargetsForm> for Targets {
    fn from(form: TargetsForm) -> Self {
        match form {
            TargetsForm::One(s) if s.eq_ignore_ascii_case("all-linear") => Self::AllLinear,
            TargetsForm::One(s) if s == NONE => Self::Nothing,
            TargetsForm::One(s) => Self::Regex(s),
            TargetsForm::Many(names) => Self::List(names),
        }
    }
}

impl From<Targets> for TargetsForm {
    fn from(targets: Targets) -> Self {
        match targets {
            Targets::AllLinear => Self::One("all-linear".into()),
            Targets::Nothing => Self::One(NONE.into()),
            Targets::Regex(s) => Self::One(s),
            Targets::List(names) => Self::Many(names),
        }
    }
}
