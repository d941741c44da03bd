//! Which modules a configuration means: PEFT's matching rules
//! (`tuners_utils.py:check_target_module_exists`, `other.py:get_pattern_key`, `other.py:_set_trainable`).

use fancy_regex::Regex;

use crate::base::module_shape::ModuleKind;
use crate::base::module_shape::ModuleShape;
use crate::config::Targets;

/// The part of a configuration that all methods share.
pub struct Selection<'a> {
    /// Modules to adapt; `None` stands for `default`.
    pub target: Option<&'a Targets>,
    /// What the method adapts in the Llama family when it is not told.
    pub default: &'static [&'static str],
    /// Modules to leave out of them.
    pub exclude: Option<&'a Targets>,
    /// Modules to train and save whole.
    pub save: &'a [String],
    /// Only these layers; empty for all.
    pub layers: &'a [usize],
    /// Names before the layer's number; empty for any.
    pub layers_pattern: &'a [String],
    /// Rank where no pattern says otherwise.
    pub rank: usize,
    /// Alpha where no pattern says otherwise.
    pub alpha: f64,
    /// Other ranks.
    pub rank_pattern: &'a [(String, usize)],
    /// Other alphas.
    pub alpha_pattern: &'a [(String, f64)],
    /// Whether a head that shares the embedding's weights follows what is done to the embedding.
    pub tie: Tie,
}

/// What becomes of a head that shares the embedding's weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tie {
    /// It stays as it was.
    #[default]
    No,
    /// It follows the embedding (`ensure_weight_tying`).
    Follows,
    /// It would, but for this option, which means another thing on a head than on an embedding.
    Not(&'static str),
}

impl Selection<'_> {
    /// No module, and none of the options: what a method without some of them builds on.
    pub const NOTHING: Self = Self {
        target: Some(&Targets::Nothing),
        default: &[],
        exclude: None,
        save: &[],
        layers: &[],
        layers_pattern: &[],
        rank: 1,
        alpha: 1.0,
        rank_pattern: &[],
        alpha_pattern: &[],
        tie: Tie::No,
    };
}

/// What most methods of PEFT's adapt in the Llama family when `target_modules` is not given.
pub const DEFAULT_TARGETS: [&str; 2] = ["q_proj", "v_proj"];

/// A compiled [`Selection`], with a note of which of its entries have matched.
pub(crate) struct Matcher {
    target: Names,
    exclude: Names,
    save: Vec<(Entry, Option<Regex>)>,
    layers: Vec<(usize, bool)>,
    layer_patterns: Vec<Regex>,
    rank: Vec<(Entry, Regex, usize)>,
    alpha: Vec<(Entry, Regex, f64)>,
    /// Whether what is meant for a head means the embedding whose weights it shares.
    tied: bool,
}

/// One thing the user wrote, and whether it has matched a module.
pub(crate) struct Entry {
    pub text: String,
    pub used: bool,
}

enum Names {
    Nothing,
    AllLinear,
    Regex(Entry, Regex),
    List(Vec<Entry>),
}

/// What a module is to the adapter.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Target,
    Saved,
    Neither,
}

impl Matcher {
    /// Compiles all patterns; what does not compile is returned, one line each.
    pub fn new(s: &Selection<'_>) -> Result<Self, Vec<String>> {
        let mut problems = Vec::new();
        let defaults = Targets::List(s.default.iter().map(|name| (*name).to_string()).collect());
        let target = Names::new(
            "target_modules",
            Some(s.target.unwrap_or(&defaults)),
            &mut problems,
        );
        let exclude = match s.exclude {
            // Only `target_modules` knows this word.
            Some(Targets::AllLinear) => Names::new(
                "exclude_modules",
                Some(&Targets::Regex("all-linear".into())),
                &mut problems,
            ),
            other => Names::new("exclude_modules", other, &mut problems),
        };
        // PEFT takes an entry of `modules_to_save` as an expression here, and as text when it looks
        // for the module itself.
        let save = s.save.iter().map(|name| {
            (
                Entry::new(name),
                compile(
                    "modules_to_save",
                    &format!(r"\A(?:^|.*\.)(?:{name})(?:\z|\..*)"),
                    &mut problems,
                ),
            )
        });
        let save = save.collect();
        let mut pattern = |option: &str, key: &str| {
            compile(option, &format!(r"\A(?:.*\.)?(?:{key})\z"), &mut problems)
                .map(|regex| (Entry::new(key), regex))
        };
        let rank = s
            .rank_pattern
            .iter()
            .filter_map(|(k, r)| pattern("rank_pattern", k).map(|(e, x)| (e, x, *r)));
        let rank = rank.collect();
        let alpha = s
            .alpha_pattern
            .iter()
            .filter_map(|(k, a)| pattern("alpha_pattern", k).map(|(e, x)| (e, x, *a)));
        let alpha = alpha.collect();
        // The lazy start finds the first number in a name: the layer's, not an expert's below it.
        let layer_patterns = match s.layers_pattern {
            [] => vec![r"\A.*?\.[^.]*\.(\d+)\.".to_string()],
            given => given
                .iter()
                .map(|p| format!(r"\A(?:|.*?\.)(?:{p})\.(?<enamel_layer>\d+)\."))
                .collect(),
        };
        let layer_patterns = layer_patterns
            .iter()
            .filter_map(|p| compile("layers_pattern", p, &mut problems))
            .collect();
        let layers = s.layers.iter().map(|layer| (*layer, false)).collect();
        let matcher = Self {
            target,
            exclude,
            save,
            layers,
            layer_patterns,
            rank,
            alpha,
            tied: false,
        };
        if s.save.iter().any(String::is_empty) {
            problems.push("modules_to_save: an empty name would mean every module".into());
        }
        if problems.is_empty() {
            Ok(matcher)
        } else {
            Err(problems)
        }
    }

    /// From now on, what names the head or the embedding means the embedding, which the head follows.
    pub fn tie(&mut self) {
        self.tied = true;
    }

    /// What an embedding is to an adapter whose head follows it, as PEFT's `_check_tied_modules` has it:
    /// names count by their last part, an expression by whether it matches one of the two bare names.
    fn tied_role(&mut self) -> Result<Option<Role>, String> {
        const BOTH: [&str; 2] = ["embed_tokens", "lm_head"];
        let is_one = |text: &str| {
            text.rsplit('.')
                .next()
                .is_some_and(|end| BOTH.contains(&end))
        };
        let mut saved = false;
        for (entry, _) in self
            .save
            .iter_mut()
            .filter(|(entry, _)| is_one(&entry.text))
        {
            entry.used = true;
            saved = true;
        }
        if saved {
            return Ok(Some(Role::Saved));
        }
        let hits = match &self.target {
            Names::List(list) => {
                let all = list.iter().enumerate();
                all.filter(|(_, entry)| is_one(&entry.text))
                    .map(|(i, _)| i)
                    .collect()
            }
            Names::Regex(..) => {
                let [table, head] = BOTH.map(|name| self.target.hits(name));
                [table?, head?].concat()
            }
            Names::Nothing | Names::AllLinear => Vec::new(),
        };
        self.target.mark(&hits);
        Ok((!hits.is_empty()).then_some(Role::Target))
    }

    /// Decides about one module. `Err` holds a regular expression's failure on this name.
    pub fn role(&mut self, module: &ModuleShape) -> Result<Role, String> {
        let name = module.name.as_str();
        if self.tied
            && module.kind == ModuleKind::Embedding
            && let Some(role) = self.tied_role()?
        {
            return Ok(role);
        }
        let excluded = self.exclude.hits(name)?;
        self.exclude.mark(&excluded);
        if self.is_saved(name) {
            return Ok(Role::Saved);
        }
        let hits = self.target.hits(name)?;
        let by_name = match &self.target {
            Names::AllLinear => module.kind == ModuleKind::Linear,
            _ => !hits.is_empty(),
        };
        let in_saved = |(_, regex): &(Entry, Option<Regex>)| {
            regex
                .as_ref()
                .is_some_and(|r| r.is_match(name).unwrap_or(false))
        };
        if !by_name
            || !excluded.is_empty()
            || self.save.iter().any(in_saved)
            || !self.in_layers(name)?
        {
            return Ok(Role::Neither);
        }
        self.target.mark(&hits);
        Ok(Role::Target)
    }

    /// Rank and alpha of a target.
    pub fn rank_alpha(
        &mut self,
        name: &str,
        rank: usize,
        alpha: f64,
    ) -> Result<(usize, f64), String> {
        Ok((
            first_match(&mut self.rank, name, rank)?,
            first_match(&mut self.alpha, name, alpha)?,
        ))
    }

    /// Whether `modules_to_save` names the module or a block it is in. PEFT compares ends of names
    /// without regard to dots.
    fn is_saved(&mut self, name: &str) -> bool {
        let ends = name.match_indices('.').map(|(i, _)| i).chain([name.len()]);
        let blocks: Vec<&str> = ends.map(|end| &name[..end]).collect();
        let mut saved = false;
        for (entry, _) in &mut self.save {
            if blocks.iter().any(|block| block.ends_with(&entry.text)) {
                entry.used = true;
                saved = true;
            }
        }
        saved
    }

    fn in_layers(&mut self, name: &str) -> Result<bool, String> {
        // A name given in full is taken whatever its layer.
        let in_full =
            matches!(&self.target, Names::List(list) if list.iter().any(|e| e.text == name));
        if self.layers.is_empty() || in_full {
            return Ok(true);
        }
        for pattern in &self.layer_patterns {
            let found = pattern
                .captures(name)
                .map_err(|e| format!("layers_pattern on {name}: {e}"))?;
            let Some(captures) = found else { continue };
            let group = captures.name("enamel_layer").or_else(|| captures.get(1));
            let layer = group.and_then(|m| m.as_str().parse::<usize>().ok());
            for (wanted, used) in &mut self.layers {
                if Some(*wanted) == layer {
                    *used = true;
                    return Ok(true);
                }
            }
            return Ok(false);
        }
        Ok(false)
    }

    /// Everything the user wrote that matched nothing: option and entry.
    pub fn unused(&self) -> Vec<(&'static str, &str)> {
        let mut out = self.target.unused("target_modules");
        out.extend(self.exclude.unused("exclude_modules"));
        let save = self
            .save
            .iter()
            .map(|(entry, _)| ("modules_to_save", entry));
        let rank = self.rank.iter().map(|(entry, ..)| ("rank_pattern", entry));
        let alpha = self
            .alpha
            .iter()
            .map(|(entry, ..)| ("alpha_pattern", entry));
        let idle = save
            .chain(rank)
            .chain(alpha)
            .filter(|(_, entry)| !entry.used);
        out.extend(idle.map(|(option, entry)| (option, entry.text.as_str())));
        out
    }

    /// Layers asked for that hold no target.
    pub fn unused_layers(&self) -> Vec<usize> {
        self.layers
            .iter()
            .filter(|(_, used)| !used)
            .map(|(layer, _)| *layer)
            .collect()
    }
}

impl Names {
    fn new(option: &str, targets: Option<&Targets>, problems: &mut Vec<String>) -> Self {
        match targets {
            None | Some(Targets::Nothing) => Self::Nothing,
            Some(Targets::AllLinear) => Self::AllLinear,
            Some(Targets::List(names)) => {
                Self::List(names.iter().map(|name| Entry::new(name)).collect())
            }
            Some(Targets::Regex(pattern)) => {
                match compile(option, &format!(r"\A(?:{pattern})\z"), problems) {
                    Some(regex) => Self::Regex(Entry::new(pattern), regex),
                    None => Self::Nothing,
                }
            }
        }
    }

    /// The entries that match. `AllLinear` has none; the module's kind decides there.
    fn hits(&self, name: &str) -> Result<Vec<usize>, String> {
        Ok(match self {
            Self::Nothing | Self::AllLinear => Vec::new(),
            Self::Regex(entry, regex) => {
                let hit = regex
                    .is_match(name)
                    .map_err(|e| format!("{:?} on {name}: {e}", entry.text))?;
                if hit { vec![0] } else { Vec::new() }
            }
            Self::List(list) => {
                let means = |text: &str| {
                    name == text
                        || name
                            .strip_suffix(text)
                            .is_some_and(|head| head.ends_with('.'))
                };
                list.iter()
                    .enumerate()
                    .filter(|(_, e)| means(&e.text))
                    .map(|(i, _)| i)
                    .collect()
            }
        })
    }

    fn mark(&mut self, hits: &[usize]) {
        match self {
            Self::Regex(entry, _) => entry.used |= !hits.is_empty(),
            Self::List(list) => hits.iter().for_each(|i| list[*i].used = true),
            Self::Nothing | Self::AllLinear => {}
        }
    }

    fn unused(&self, option: &'static str) -> Vec<(&'static str, &str)> {
        match self {
            Self::Nothing | Self::AllLinear => Vec::new(),
            Self::Regex(entry, _) if entry.used => Vec::new(),
            Self::Regex(entry, _) => vec![(option, &entry.text)],
            Self::List(list) => list
                .iter()
                .filter(|e| !e.used)
                .map(|e| (option, e.text.as_str()))
                .collect(),
        }
    }
}

impl Entry {
    fn new(text: &str) -> Self {
        Self {
            text: text.to_string(),
            used: false,
        }
    }
}

/// Whether `targets` means the module of this name; a regular expression that does not compile means
/// none.
pub(crate) fn names_module(targets: &Targets, name: &str) -> bool {
    let names = Names::new("", Some(targets), &mut Vec::new());
    names.hits(name).is_ok_and(|hits| !hits.is_empty())
}

fn first_match<T: Copy>(
    patterns: &mut [(Entry, Regex, T)],
    name: &str,
    default: T,
) -> Result<T, String> {
    for (entry, regex, value) in patterns {
        if regex
            .is_match(name)
            .map_err(|e| format!("{:?} on {name}: {e}", entry.text))?
        {
            entry.used = true;
            return Ok(*value);
        }
    }
    Ok(default)
}

fn compile(option: &str, pattern: &str, problems: &mut Vec<String>) -> Option<Regex> {
    Regex::new(pattern)
        .map_err(|e| {
            problems.push(format!(
                "{option}: {pattern} is not a regular expression: {e}"
            ))
        })
        .ok()
}

/// Up to three names the user may have meant: the ends of module names that look most like `text`.
pub(crate) fn nearest(text: &str, modules: &[ModuleShape]) -> Vec<String> {
    let segments = text.split('.').count();
    let mut scored: Vec<(f64, String)> = Vec::new();
    for module in modules {
        let parts: Vec<&str> = module.name.split('.').collect();
        let end = parts[parts.len().saturating_sub(segments)..].join(".");
        if !scored.iter().any(|(_, seen)| *seen == end) {
            scored.push((strsim::jaro_winkler(text, &end), end));
        }
    }
    scored.retain(|(score, _)| *score > 0.7);
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    scored.into_iter().take(3).map(|(_, name)| name).collect()
}
