//! First values of LoRA's factors: the schemes of `init_lora_weights`.
//!
//! PiSSA: Meng et al. 2024 (arXiv:2404.02948). OLoRA: Büyükakyüz 2024 (arXiv:2406.01775). EVA: Paischer et
//! al. 2024 (arXiv:2410.07170), whose directions come from a pass over the data elsewhere, as LoftQ's factors
//! ([`crate::init::loftq`]) come from the weights before they were quantised. All as in PEFT's
//! `tuners/lora/layer.py`.

use super::embedding;
use super::{A, B};
use crate::error::{AdapterError, Result};
use crate::linalg::random::{gaussian, kaiming};
use crate::linalg::{LinalgError, Matrix, Svd, qr, svd_randomized, svd_truncated};
use crate::methods::lora::config::InitLora;
use crate::methods::lora::config::LoraConfig;
use crate::methods::{InitContext, MethodConfig};
use crate::plan::TargetPlan;

/// First values in the order of the method's parameters.
pub(crate) fn initial(
    config: &LoraConfig,
    target: &TargetPlan,
    start: &InitContext<'_>,
) -> Result<Vec<Vec<f32>>> {
    if target.embedding {
        return embedding(config, target, start);
    }
    let (a, b) = factors(config, target, start)?;
    let out = target.out_features;
    let mut values = vec![a, b];
    if config.lora_bias {
        values.push(match config.init_lora_weights {
            // PEFT's `False` leaves torch's own initialisation, which is that of the weight.
            InitLora::Random => {
                let bound = 1.0 / (target.r as f64).sqrt();
                crate::linalg::random::uniform(&mut start.rng(target, "lora_B.bias"), out, bound)
            }
            _ => vec![0.0; out],
        });
    }
    if config.use_dora {
        values.push(lengths(config, target, start, &values[0], &values[1])?);
    }
    Ok(values)
}

fn factors(
    config: &LoraConfig,
    target: &TargetPlan,
    start: &InitContext<'_>,
) -> Result<(Vec<f32>, Vec<f32>)> {
    let (r, width, out) = (target.r, target.in_features, target.out_features);
    let mut rng_a = start.rng(target, A);
    let zero = || vec![0.0; out * r];
    Ok(match &config.init_lora_weights {
        InitLora::Random => {
            // PEFT's `False` leaves torch's own initialisation of a linear layer on B too.
            (
                kaiming(&mut rng_a, r, width),
                kaiming(&mut start.rng(target, B), out, r),
            )
        }
        InitLora::Gaussian => (gaussian(&mut rng_a, r * width, 1.0 / r as f64), zero()),
        InitLora::Orthogonal => orthogonal(target, start).map_err(|e| failed(target, e))?,
        InitLora::Pissa => pissa(target, start, None)?,
        InitLora::PissaNiter(steps) => pissa(target, start, Some(*steps))?,
        InitLora::Olora => olora(target, start)?,
        InitLora::Eva => match start.given.and_then(|given| given(&target.name)) {
            Some(given) => (given.a, given.b.unwrap_or_else(zero)),
            None => {
                return Err(AdapterError::Start {
                    module: target.name.clone(),
                    reason: "EVA starts from the inputs of the layer, and no data were shown to it"
                        .into(),
                });
            }
        },
        InitLora::Loftq => match start.given {
            Some(given) => match given(&target.name) {
                Some(given) => (given.a, given.b.unwrap_or_else(zero)),
                // What is not quantised has nothing to make up for.
                None => (kaiming(&mut rng_a, r, width), zero()),
            },
            None => {
                return Err(AdapterError::Start {
                    module: target.name.clone(),
                    reason: "LoftQ starts from what quantising the layer lost, and the weight as it was before \
                             is not there; attach with attach_given and what loftq::start gives"
                        .into(),
                });
            }
        },
        // `Other` is refused before this.
        InitLora::Default | InitLora::Other(_) => (kaiming(&mut rng_a, r, width), zero()),
    })
}

/// PEFT: A zero and B normal, or both normal.
fn embedding(
    config: &LoraConfig,
    target: &TargetPlan,
    start: &InitContext<'_>,
) -> Result<Vec<Vec<f32>>> {
    let (r, rows, width) = (target.r, target.in_features, target.out_features);
    let a = match config.init_lora_weights {
        InitLora::Random => gaussian(&mut start.rng(target, embedding::A), r * rows, 1.0),
        _ => vec![0.0; r * rows],
    };
    let b = gaussian(&mut start.rng(target, embedding::B), width * r, 1.0);
    let mut values = vec![a, b];
    if config.use_dora {
        // Columns of the table plus those of the update; A is zero unless all is random.
        let table = (start.weight)()?;
        let mut squares = vec![0.0_f64; width];
        for (token, row) in table.chunks(width).enumerate() {
            for (column, (value, sum)) in row.iter().zip(&mut squares).enumerate() {
                let own: f32 = (0..r)
                    .map(|k| values[0][k * rows + token] * values[1][column * r + k])
                    .sum();
                let value = f64::from(*value) + target.scale * f64::from(own);
                *sum += value * value;
            }
        }
        values.push(squares.into_iter().map(|s| s.sqrt() as f32).collect());
    }
    Ok(values)
}

/// DoRA's lengths: those of the rows of `W + s·B·A`.
fn lengths(
    config: &LoraConfig,
    target: &TargetPlan,
    start: &InitContext<'_>,
    a: &[f32],
    b: &[f32],
) -> Result<Vec<f32>> {
    let (r, width) = (target.r, target.in_features);
    let scale = MethodConfig::scale(config, r, target.alpha);
    let weight = (start.weight)()?;
    let mut row = vec![0.0_f64; width];
    let lengths = weight.chunks(width).zip(b.chunks(r)).map(|(weight, b)| {
        row.iter_mut()
            .zip(weight)
            .for_each(|(sum, w)| *sum = f64::from(*w));
        for (factor, a) in b.iter().zip(a.chunks(width)).filter(|(b, _)| **b != 0.0) {
            let factor = scale * f64::from(*factor);
            row.iter_mut()
                .zip(a)
                .for_each(|(sum, a)| *sum += factor * f64::from(*a));
        }
        row.iter().map(|v| v * v).sum::<f64>().sqrt() as f32
    });
    Ok(lengths.collect())
}

/// The leading singular vectors, each side with the root of the singular value; what they make times the
/// scale is the leading part of the weight.
fn pissa(
    target: &TargetPlan,
    start: &InitContext<'_>,
    power_steps: Option<usize>,
) -> Result<(Vec<f32>, Vec<f32>)> {
    let weight = weight(target, start)?;
    let svd = match power_steps {
        None => svd_truncated(&weight, target.r),
        Some(steps) => {
            let seed = rand_chacha::rand_core::RngCore::next_u64(&mut start.rng(target, "pissa"));
            svd_randomized(&weight, target.r, steps, seed)
        }
    };
    Ok(shared(&svd.map_err(|e| failed(target, e))?, target))
}

/// A and B of which `s·B·A` is what a decomposition stands for, each with the root of the singular values over
/// the scale `s`.
pub(crate) fn shared(svd: &Svd, target: &TargetPlan) -> (Vec<f32>, Vec<f32>) {
    let Svd { u, s, vt } = svd;
    let (r, width, out) = (target.r, target.in_features, target.out_features);
    let roots: Vec<f64> = s.iter().map(|s| (s / target.scale).sqrt()).collect();
    let mut a = Vec::with_capacity(r * width);
    for (k, root) in roots.iter().enumerate() {
        a.extend(vt.row(k).iter().map(|v| (f64::from(*v) * root) as f32));
    }
    let mut b = Vec::with_capacity(out * r);
    for i in 0..out {
        b.extend(
            u.row(i)
                .iter()
                .zip(&roots)
                .map(|(u, root)| (f64::from(*u) * root) as f32),
        );
    }
    (a, b)
}

/// The leading columns of Q and rows of R. As in PEFT, the scale is left to the residual.
fn olora(target: &TargetPlan, start: &InitContext<'_>) -> Result<(Vec<f32>, Vec<f32>)> {
    let weight = weight(target, start)?;
    let (q, r) = qr(&weight).map_err(|e| failed(target, e))?;
    let rank = target.r;
    let a = (0..rank).flat_map(|k| r.row(k).to_vec()).collect();
    let b = (0..target.out_features)
        .flat_map(|i| q.row(i)[..rank].to_vec())
        .collect();
    Ok((a, b))
}

/// A from the odd rows of a random orthogonal matrix, B from the even ones: B·A is zero, and neither
/// factor is.
fn orthogonal(
    target: &TargetPlan,
    start: &InitContext<'_>,
) -> std::result::Result<(Vec<f32>, Vec<f32>), LinalgError> {
    let (r, width, out) = (target.r, target.in_features, target.out_features);
    let half = r / 2;
    let mut rng = start.rng(target, "orthogonal");
    let random = Matrix::new(r, r, gaussian(&mut rng, r * r, 1.0))?;
    let (q, _) = qr(&random)?;
    let rows = |first: usize| {
        let picked = (first..r).step_by(2).flat_map(|k| q.row(k).to_vec());
        Matrix::new(half, r, picked.collect())
    };
    let mix = |count: usize, rng: &mut rand_chacha::ChaCha8Rng| {
        Matrix::new(count, half, gaussian(rng, count * half, 1.0))
    };
    let a = mix(width, &mut start.rng(target, A))?
        .matmul(&rows(0)?)?
        .transpose();
    let b = mix(out, &mut start.rng(target, B))?.matmul(&rows(1)?)?;
    let tenth = |m: Matrix| m.data().iter().map(|v| v / 10.0).collect();
    Ok((tenth(a), tenth(b)))
}

fn weight(target: &TargetPlan, start: &InitContext<'_>) -> Result<Matrix> {
    let values = (start.weight)()?;
    Matrix::new(target.out_features, target.in_features, values).map_err(|e| failed(target, e))
}

pub(crate) fn failed(target: &TargetPlan, error: LinalgError) -> AdapterError {
    AdapterError::Start {
        module: target.name.clone(),
        reason: format!("its first values cannot be computed: {error}"),
    }
}
