//! Sequence classification: a text's class from the hidden state of its last token, as in transformers'
//! `…ForSequenceClassification` on a decoder.

use std::collections::BTreeSet;
use std::path::Path;

use burn::tensor::Tensor;
use enamel_adapter::offline::inspect::AdapterFacts;
use enamel_data::{
    ClassSpec, Classes, ClassifiedText, DataSpec, LabelledText, Row, Rows, load_labelled,
};
use enamel_model::checkpoint::TensorSource;
use enamel_model::heads::CLASSIFIER;
use enamel_model::{HeadConfig, Model, ModelInput};

use super::{
    ClassScores, LossSettings, Measured, MetricSpec, Opened, Prompt, Source, Tally, Task,
    TaskBatch, cross_entropy, hold_back, ids, indices, spread,
};
use crate::base::OpenBase;
use crate::error::TrainError;
use crate::recipe::{Recipe, TaskName, TrainSettings};

/// The task.
#[derive(Clone, Debug)]
pub struct SequenceClassification {
    classes: Classes,
    /// Whether the base's files have this head.
    stored: bool,
    /// The token that fills up short rows, and that is never a text's last one.
    pad_id: u32,
}

/// Several texts padded on the right to one length.
#[derive(Clone, Debug)]
pub struct ClassBatch {
    /// Token ids `[batch, len]`, row-major, the padding id after a row's end.
    pub input_ids: Vec<i64>,
    /// Number of rows and padded length.
    pub shape: [usize; 2],
    /// Where in `input_ids` each row's class is read off.
    pub last: Vec<i64>,
    /// The class of each row.
    pub labels: Vec<Option<usize>>,
    /// Real tokens.
    pub tokens: usize,
}

impl TaskBatch for ClassBatch {
    fn count(&self) -> usize {
        self.labels.iter().flatten().count()
    }

    fn tokens(&self) -> usize {
        self.tokens
    }
}

/// How often rows of one class were taken for another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Confusion {
    classes: usize,
    /// Rows by class, then by what the model says, `[classes, classes]`.
    counts: Vec<u64>,
}

impl Confusion {
    /// Nothing counted yet, of so many classes.
    pub fn new(classes: usize) -> Self {
        Self {
            classes,
            counts: vec![0; classes * classes],
        }
    }

    /// Counts a row of `class` that the model takes for `predicted`.
    pub fn note(&mut self, class: usize, predicted: usize) {
        if let Some(count) = self.counts.get_mut(class * self.classes + predicted) {
            *count += 1;
        }
    }

    /// Rows of `class` that the model takes for `predicted`.
    pub fn count(&self, class: usize, predicted: usize) -> u64 {
        let place = class * self.classes + predicted;
        self.counts.get(place).copied().unwrap_or(0)
    }

    fn rows(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Share of rows whose class is right.
    pub fn accuracy(&self) -> f64 {
        let right: u64 = (0..self.classes)
            .map(|class| self.count(class, class))
            .sum();
        right as f64 / self.rows().max(1) as f64
    }

    /// Rows of a class, and how many of them and of others the model takes for it.
    fn of_class(&self, class: usize) -> (u64, u64) {
        let all = 0..self.classes;
        let actual = all.clone().map(|other| self.count(class, other)).sum();
        let predicted = all.map(|other| self.count(other, class)).sum();
        (actual, predicted)
    }

    /// Precision, recall and F1 of a class; 0 where there is nothing to divide by.
    pub fn scores(&self, class: usize) -> [f64; 3] {
        let (actual, predicted) = self.of_class(class);
        let right = self.count(class, class) as f64;
        let share = |of: u64| right / of.max(1) as f64;
        let f1 = 2.0 * right / (actual + predicted).max(1) as f64;
        [share(predicted), share(actual), f1]
    }

    /// Mean F1 of the classes that rows have or that the model says (scikit-learn's `average="macro"`).
    pub fn macro_f1(&self) -> f64 {
        let seen = (0..self.classes).filter(|class| self.of_class(*class) != (0, 0));
        let f1: Vec<f64> = seen.map(|class| self.scores(class)[2]).collect();
        f1.iter().sum::<f64>() / f1.len().max(1) as f64
    }
}

impl Tally for Confusion {
    fn add(&mut self, other: &Self) {
        if self.counts.is_empty() {
            self.clone_from(other);
            return;
        }
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
    }

    fn numbers(&mut self) -> impl Iterator<Item = &mut u64> {
        self.counts.iter_mut()
    }
}

impl Task for SequenceClassification {
    type Row = ClassifiedText;
    type Batch = ClassBatch;
    type Tally = Confusion;

    const NAME: TaskName = TaskName::SeqCls;
    const TASK_TYPE: &'static str = "SEQ_CLS";
    const COUNTED: &'static str = "rows";
    const METRICS: &'static [MetricSpec<Confusion>] = &[
        MetricSpec::LOSS,
        MetricSpec {
            key: "accuracy",
            label: "Accuracy",
            higher_is_better: true,
            in_training: true,
            logged_in_training: true,
            decimals: 4,
            of: |measured: &Measured<Confusion>| measured.tally.accuracy(),
        },
        MetricSpec {
            key: "f1",
            label: "F1 (macro)",
            higher_is_better: true,
            in_training: false,
            logged_in_training: false,
            decimals: 4,
            of: |measured: &Measured<Confusion>| measured.tally.macro_f1(),
        },
    ];

    fn provisional_head() -> HeadConfig {
        head(&Classes::unnamed(2), false)
    }

    fn open(recipe: &Recipe, base: &OpenBase, source: Source) -> Result<Opened<Self>, TrainError> {
        let columns = ClassSpec {
            text_columns: recipe.data.text_columns.clone(),
            label_column: recipe.data.label_column.clone(),
            optional: false,
        };
        let load = |spec: &DataSpec| -> Result<Rows<LabelledText>, TrainError> {
            Ok(load_labelled(spec, &columns, &base.tokenizer)?)
        };
        // The training rows say which classes there are, also to somebody who only validates.
        let all = load(&recipe.data.train_spec())?;
        let (classes, stored, mut notes) = classes(recipe, base, &all.rows)?;
        let finish = |rows: Rows<LabelledText>| -> Result<Rows<ClassifiedText>, TrainError> {
            let mut rows = classes.apply(rows)?;
            rows.note_positions(base.config.context_length());
            Ok(rows)
        };
        let rows = finish(all)?;
        let (train, valid) = match recipe.data.valid_spec() {
            Some(spec) => (rows, finish(load(&spec)?)?),
            None => hold_back(rows, recipe),
        };
        if source == Source::Both {
            notes.extend(without_rows(&classes, &train.rows));
        }
        let task = Self {
            pad_id: padding(base),
            classes,
            stored,
        };
        Ok(Opened {
            task,
            train,
            valid,
            notes,
        })
    }

    fn head(&self) -> HeadConfig {
        head(&self.classes, self.stored)
    }

    fn labels(&self) -> &[String] {
        self.classes.names()
    }

    fn collate(&self, rows: &[&ClassifiedText]) -> ClassBatch {
        let len = rows.iter().map(|row| row.tokens()).max().unwrap_or(0);
        let pad = i64::from(self.pad_id);
        let mut batch = ClassBatch {
            input_ids: Vec::with_capacity(rows.len() * len),
            shape: [rows.len(), len],
            last: Vec::with_capacity(rows.len()),
            labels: rows.iter().map(|row| row.label).collect(),
            tokens: rows.iter().map(|row| row.tokens()).sum(),
        };
        for (number, row) in rows.iter().enumerate() {
            let ids = row.input_ids.iter().map(|id| i64::from(*id));
            batch.input_ids.extend(ids);
            batch.input_ids.resize((number + 1) * len, pad);
            // transformers looks for padding by its id alone: a text that ends with such a token is read off
            // before it.
            let last = row.input_ids.iter().rposition(|id| *id != self.pad_id);
            batch.last.push((number * len + last.unwrap_or(0)) as i64);
        }
        batch
    }

    /// Mean cross-entropy of the rows' classes, as transformers' `ForSequenceClassificationLoss` has it for
    /// `single_label_classification`.
    ///
    /// Rows are padded on the right and attention is causal, so no real token ever sees padding.
    fn loss(
        &self,
        model: &Model,
        batch: &ClassBatch,
        settings: LossSettings,
    ) -> (Tensor<1>, Confusion) {
        let logits = logits(model, batch, settings.seed);
        let device = logits.device();
        let labelled = batch.labels.iter().enumerate();
        let (places, classes): (Vec<i64>, Vec<i64>) = labelled
            .filter_map(|(row, class)| Some((row as i64, (*class)? as i64)))
            .unzip();
        let predicted = likeliest(&logits);
        let mut tally = Confusion::new(self.classes.len());
        for (class, predicted) in batch.labels.iter().zip(predicted) {
            if let Some(class) = class {
                tally.note(*class, predicted);
            }
        }
        let logits = match places.len() == batch.labels.len() {
            true => logits,
            false => logits.select(0, indices(places, &device)),
        };
        (
            cross_entropy(logits, classes, settings.label_smoothing),
            tally,
        )
    }

    fn class_scores(&self, tally: &Confusion) -> Vec<ClassScores> {
        let named = self.classes.names().iter().enumerate();
        named
            .map(|(class, label)| {
                let [precision, recall, f1] = tally.scores(class);
                ClassScores {
                    label: label.clone(),
                    rows: tally.of_class(class).0,
                    precision,
                    recall,
                    f1,
                    predicted: (0..self.classes.len())
                        .map(|predicted| tally.count(class, predicted))
                        .collect(),
                }
            })
            .collect()
    }

    fn prompts(
        &self,
        settings: &TrainSettings,
        rows: &[ClassifiedText],
        base: &OpenBase,
    ) -> Result<Vec<Prompt>, TrainError> {
        let prompt = |text: String, ids: Vec<u32>, class: Option<usize>| Prompt {
            text,
            ids,
            reference: class.and_then(|class| self.classes.names().get(class).cloned()),
        };
        if settings.sample_prompts.is_empty() {
            let rows = spread(rows, settings.samples);
            let of_row = |row: &ClassifiedText| {
                let text = match base.has_tokenizer {
                    true => base.tokenizer.decode(&row.input_ids, true)?,
                    false => row.source.to_string(),
                };
                let text = text.trim().to_owned();
                Ok(prompt(text, row.input_ids.clone(), row.label))
            };
            return rows.map(of_row).collect();
        }
        let written = settings.sample_prompts.iter();
        let written = written.map(|text| {
            let ids = base.tokenizer.encode(text, true)?;
            Ok(prompt(text.clone(), ids, None))
        });
        written.collect()
    }

    fn answers(
        &self,
        model: &Model,
        _: &OpenBase,
        prompts: &[Prompt],
        _: usize,
    ) -> Result<Vec<String>, TrainError> {
        let answer = |prompt: &Prompt| {
            let probabilities = self.probabilities(model, &[&prompt.ids])?;
            let (class, probability) = best(&probabilities[0]);
            let name = self.classes.names().get(class);
            let name = name.map_or("?", String::as_str);
            Ok(format!("{name} ({probability:.3})"))
        };
        prompts.iter().map(answer).collect()
    }
}

impl SequenceClassification {
    /// The task with these classes, whose texts are filled up with `pad_id`.
    pub fn new(classes: Classes, pad_id: u32) -> Self {
        Self {
            classes,
            stored: false,
            pad_id,
        }
    }

    /// The task of a classifier that is trained, an adapter or a whole model: its classes. Gives the base their head.
    ///
    /// # Errors
    /// An adapter for another task; a model without a head for classes.
    pub fn of_trained(base: &mut OpenBase, adapter: Option<&Path>) -> Result<Self, TrainError> {
        let own = own_classes(base);
        let classes = match adapter {
            Some(dir) => classes_of(dir, own.as_ref())?,
            None => own.clone().ok_or_else(|| {
                TrainError::Mismatch(format!(
                    "{}: its files have no head for classes ({CLASSIFIER}.weight)\n  \
                     help: name an adapter that was trained with task = \"seq_cls\"",
                    base.local.path.display()
                ))
            })?,
        };
        let task = Self {
            pad_id: padding(base),
            stored: own.as_ref() == Some(&classes),
            classes,
        };
        base.set_head(task.head());
        Ok(task)
    }

    /// The classes.
    pub fn classes(&self) -> &Classes {
        &self.classes
    }

    /// The probability of each class for each of these texts.
    ///
    /// # Errors
    /// When the model's output is not a number or the device fails.
    pub fn probabilities(
        &self,
        model: &Model,
        texts: &[&Vec<u32>],
    ) -> Result<Vec<Vec<f32>>, TrainError> {
        let rows: Vec<ClassifiedText> = texts
            .iter()
            .map(|ids| ClassifiedText::unlabelled(ids.to_vec()))
            .collect();
        let rows: Vec<&ClassifiedText> = rows.iter().collect();
        let logits = logits(model, &self.collate(&rows), None);
        let probabilities = burn::tensor::activation::softmax(logits, 1);
        let values = probabilities
            .into_data()
            .try_into_vec_as::<f32>()
            .map_err(|error| TrainError::Framework(format!("reading the classes: {error}")))?;
        if values.iter().any(|value| !value.is_finite()) {
            return Err(TrainError::Mismatch(
                "the logits of the classes are not finite: the weights or the adapter are damaged"
                    .to_owned(),
            ));
        }
        Ok(values
            .chunks(self.classes.len().max(1))
            .map(<[f32]>::to_vec)
            .collect())
    }
}

/// The likeliest class and its probability.
pub fn best(probabilities: &[f32]) -> (usize, f32) {
    let all = probabilities.iter().copied().enumerate();
    // The first of equals, as `argmax` has it.
    all.fold((0, f32::MIN), |best, other| match other.1 > best.1 {
        true => other,
        false => best,
    })
}

fn head(classes: &Classes, stored: bool) -> HeadConfig {
    HeadConfig::SequenceClassification {
        labels: classes.names().to_vec(),
        stored,
    }
}

/// The padding token by which transformers finds a text's end.
fn padding(base: &OpenBase) -> u32 {
    let of_model = base.config.pad_token_id;
    of_model.unwrap_or_else(|| base.tokenizer.padding_id())
}

/// The classes' logits `[rows, classes]`.
fn logits(model: &Model, batch: &ClassBatch, seed: Option<u64>) -> Tensor<2> {
    let device = model.device();
    let input = ModelInput {
        seed,
        ..ModelInput::new(ids(batch.input_ids.clone(), batch.shape, &device))
    };
    let hidden = model.forward_hidden(&input, None);
    let [rows, len, width] = hidden.dims();
    let places = indices(batch.last.clone(), &device);
    model.logits(hidden.reshape([rows * len, width]).select(0, places))
}

/// Each row's likeliest class; class 0 where the device fails, which the loss then says.
fn likeliest(logits: &Tensor<2>) -> Vec<usize> {
    let [rows, classes] = logits.dims();
    let values = logits.clone().into_data().try_into_vec_as::<f32>();
    let values = values.unwrap_or_else(|_| vec![0.0; rows * classes]);
    let rows = values.chunks(classes.max(1));
    rows.map(|row| best(row).0).collect()
}

/// The classes that an adapter was trained for: by its own account, else as many as its head has outputs.
fn classes_of(adapter: &Path, own: Option<&Classes>) -> Result<Classes, TrainError> {
    let facts = AdapterFacts::read(adapter)?;
    let refuse = |reason: String| TrainError::Run {
        path: adapter.to_owned(),
        reason,
        help: "name an adapter that was trained with task = \"seq_cls\"".to_owned(),
    };
    match facts.config.task_type() {
        Some(SequenceClassification::TASK_TYPE) | None => {}
        Some(other) => return Err(refuse(format!("it is for task_type = {other}"))),
    }
    let labels = enamel_adapter::made(adapter).labels;
    if !labels.is_empty() {
        return Ok(Classes::new(labels));
    }
    let head = format!(".{CLASSIFIER}.weight");
    let mut tensors = facts.tensors.iter();
    match tensors.find(|tensor| tensor.key.ends_with(&head)) {
        Some(tensor) => {
            let count = tensor.shape.first().copied().unwrap_or(0);
            let own = own.filter(|own| own.len() == count).cloned();
            Ok(own.unwrap_or_else(|| Classes::unnamed(count)))
        }
        None => own
            .cloned()
            .ok_or_else(|| refuse(format!("it has no head for classes ({CLASSIFIER})"))),
    }
}

/// The classes that the base's own head has, if its files have one.
fn own_classes(base: &OpenBase) -> Option<Classes> {
    let name = format!("{CLASSIFIER}.weight");
    let mut tensors = base.checkpoint.tensors().iter();
    let head = tensors.find(|tensor| tensor.name == name)?;
    let [count, _] = *head.shape.as_slice() else {
        return None;
    };
    let named = base.config.labels().filter(|names| names.len() == count);
    Some(named.map_or_else(|| Classes::unnamed(count), Classes::new))
}

/// Which classes there are, whether the base's own head is theirs, and what is to be said of it: the recipe's, else
/// those of the adapter that training starts from, else those of the base's head if the rows' are among them, else
/// the rows'.
fn classes(
    recipe: &Recipe,
    base: &OpenBase,
    rows: &[LabelledText],
) -> Result<(Classes, bool, Vec<String>), TrainError> {
    let own = own_classes(base);
    let of_adapter = recipe.adapter.init_from.as_deref();
    let of_adapter = of_adapter.map(|dir| enamel_adapter::made(dir).labels);
    let classes = match (&recipe.data.labels[..], of_adapter, &own) {
        (names @ [_, ..], _, _) => Classes::new(names.to_vec()),
        (_, Some(labels), _) if !labels.is_empty() => Classes::new(labels),
        (_, _, Some(own)) if own.hold(rows) => own.clone(),
        _ => Classes::found_in(rows)?,
    };
    let stored = own.as_ref() == Some(&classes);
    let note = match own {
        _ if stored => format!("the base's own head is trained on: {}", listed(&classes)),
        Some(own) => format!(
            "the base's head is for other classes ({}) and is replaced by a new one for {}",
            listed(&own),
            listed(&classes)
        ),
        None => format!(
            "the head ({CLASSIFIER}) is new, with random weights: {}",
            listed(&classes)
        ),
    };
    Ok((classes, stored, vec![note]))
}

/// A note on classes that no row to train on has.
fn without_rows(classes: &Classes, rows: &[ClassifiedText]) -> Option<String> {
    let seen: BTreeSet<usize> = rows.iter().filter_map(|row| row.label).collect();
    let missing = (0..classes.len()).filter(|class| !seen.contains(class));
    let missing: Vec<String> = missing
        .filter_map(|class| classes.names().get(class).cloned())
        .collect();
    let missing = Classes::new(missing);
    (!missing.is_empty()).then(|| {
        format!(
            "no row to train on is of {}: the model will not learn them",
            listed(&missing)
        )
    })
}

fn listed(classes: &Classes) -> String {
    const MOST: usize = 10;
    let shown = classes.names().iter().take(MOST);
    let mut shown: Vec<String> = shown
        .map(|name| crate::text::shown(name).into_owned())
        .collect();
    if let Some(more @ 1..) = classes.len().checked_sub(MOST) {
        shown.push(format!("and {more} more"));
    }
    shown.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// scikit-learn 1.9: `precision_recall_fscore_support`, `f1_score(average="macro")`, `accuracy_score` of
    /// y_true = [0, 0, 0, 1, 1, 2], y_pred = [0, 0, 1, 1, 0, 1].
    #[test]
    fn scores_are_those_of_scikit_learn() {
        let mut confusion = Confusion::new(4);
        for (class, predicted) in [(0, 0), (0, 0), (0, 1), (1, 1), (1, 0), (2, 1)] {
            confusion.note(class, predicted);
        }
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-15, "{a} {b}");
        close(confusion.accuracy(), 0.5);
        let scores = |class: usize, wanted: [f64; 3]| {
            for (a, b) in confusion.scores(class).into_iter().zip(wanted) {
                close(a, b);
            }
        };
        scores(0, [2.0 / 3.0, 2.0 / 3.0, 2.0 / 3.0]);
        scores(1, [1.0 / 3.0, 0.5, 0.4]);
        scores(2, [0.0, 0.0, 0.0]);
        close(confusion.macro_f1(), 0.355_555_555_555_555_5);
    }

    #[test]
    fn a_text_is_read_off_before_tokens_that_pad() {
        let task = SequenceClassification::new(Classes::unnamed(2), 0);
        let rows = [vec![5, 6, 0], vec![7], vec![0, 0]];
        let rows: Vec<_> = rows
            .iter()
            .map(|ids| ClassifiedText::unlabelled(ids.to_vec()))
            .collect();
        let batch = task.collate(&rows.iter().collect::<Vec<_>>());
        assert_eq!(batch.input_ids, [5, 6, 0, 7, 0, 0, 0, 0, 0]);
        assert_eq!(batch.last, [1, 3, 6]);
    }
}
