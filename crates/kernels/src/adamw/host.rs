//! Moments in memory of the host's that comes and goes by the page, wherever the parameters are.

use burn::tensor::{DType, Device, Tensor, TensorData};

use super::{AdamW, AdamWInput, Codes, MOMENT_BLOCK, Moments, Numbers, cpu, plain, reference};
use crate::cpu::storage::note_fallback;

/// Told what memory a step is about to use and what it is done with. Called from several threads.
pub trait Paging: Sync {
    /// `bytes` are about to be read and written.
    fn bring_in(&self, bytes: &[u8]);
    /// `bytes` will not be needed before the next step.
    fn let_go(&self, bytes: &[u8]);
}

/// A moment in 8 bits (see [`Codes`]).
#[derive(Debug)]
pub struct HostCodes<'a> {
    /// A code for each element.
    pub codes: &'a mut [u8],
    /// A scale for each block.
    pub absmax: &'a mut [f32],
}

/// The moments of one parameter.
#[derive(Debug)]
pub enum HostMoments<'a> {
    /// As they are.
    F32(Moments<&'a mut [f32]>),
    /// In 8 bits.
    EightBit(Moments<HostCodes<'a>>),
}

impl<'a> HostMoments<'a> {
    /// Bytes that they take.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::F32(m) => size_of_val(m.first) + size_of_val(m.second),
            Self::EightBit(m) => [&m.first, &m.second]
                .map(|m| size_of_val(m.codes) + size_of_val(m.absmax))
                .iter()
                .sum(),
        }
    }

    /// The large parts, of which paging is told.
    pub(super) fn pages(&self, mut tell: impl FnMut(&[u8])) {
        match self {
            Self::F32(Moments { first, second }) => {
                tell(bytemuck::cast_slice(first));
                tell(bytemuck::cast_slice(second));
            }
            Self::EightBit(Moments { first, second }) => {
                tell(first.codes);
                tell(second.codes);
            }
        }
    }

    /// The parts of `elements` elements each, a multiple of the block.
    pub(super) fn chunks(self, elements: usize) -> Vec<Self> {
        let codes = |m: HostCodes<'a>| {
            let scales = m.absmax.chunks_mut(elements / MOMENT_BLOCK);
            let parts = m.codes.chunks_mut(elements).zip(scales);
            parts.map(|(codes, absmax)| HostCodes { codes, absmax })
        };
        match self {
            Self::F32(m) => {
                let Moments { first, second } = m.map(|m| m.chunks_mut(elements));
                let both = first.zip(second);
                let both = both.map(|(first, second)| Self::F32(Moments { first, second }));
                both.collect()
            }
            Self::EightBit(m) => {
                let Moments { first, second } = m.map(codes);
                let both = first.zip(second);
                let both = both.map(|(first, second)| Self::EightBit(Moments { first, second }));
                both.collect()
            }
        }
    }

    fn fits(&self, elements: usize) -> bool {
        match self {
            Self::F32(m) => m.first.len() == elements && m.second.len() == elements,
            Self::EightBit(m) => [&m.first, &m.second].iter().all(|m| {
                m.codes.len() == elements && m.absmax.len() == elements.div_ceil(MOMENT_BLOCK)
            }),
        }
    }
}

/// One step of AdamW as [`super::adamw`] and [`super::adamw_8bit`] make it, with the same bits, for parameters
/// whose moments are in memory of the host's and are updated there; the new values, in the order of the
/// parameters. On a CPU `paging` is told of each part as a step comes to it, so that no more of the moments need
/// be in memory than the parts that the threads work on; elsewhere the moments of one parameter at a time
/// go to the device and come back.
///
/// # Panics
/// If the moments of a parameter are not as long as it is.
pub fn adamw_host(
    settings: &AdamW,
    factor: f64,
    paging: &dyn Paging,
    parameters: Vec<AdamWInput<HostMoments<'_>>>,
) -> Vec<Tensor<1>> {
    for p in &parameters {
        let [n] = p.value.dims();
        assert!(
            p.grad.dims() == [n] && p.moments.fits(n),
            "a parameter, its gradient and its moments have the same length"
        );
    }
    if parameters.iter().all(|p| plain(&p.value) && plain(&p.grad)) {
        return cpu::adamw_host(settings, factor, paging, parameters);
    }
    if let Some(p) = parameters.first() {
        note_fallback("adamw", &[&p.value, &p.grad]);
    }
    let step = |p: AdamWInput<HostMoments<'_>>| {
        let numbers = settings.numbers(factor, p.rate, p.time);
        visit(&numbers, paging, p)
    };
    parameters.into_iter().map(step).collect()
}

/// The step of one parameter on its device, which its moments visit.
fn visit(n: &Numbers, paging: &dyn Paging, p: AdamWInput<HostMoments<'_>>) -> Tensor<1> {
    let device = p.value.device();
    p.moments.pages(|bytes| paging.bring_in(bytes));
    let (moments, p) = p.split();
    let (value, moments) = match moments {
        HostMoments::F32(host) => {
            let moments = Moments {
                first: upload(host.first, &device),
                second: upload(host.second, &device),
            };
            let (value, moments) = reference::adamw(n, p.with(moments));
            download(moments.first, host.first);
            download(moments.second, host.second);
            (value, HostMoments::F32(host))
        }
        HostMoments::EightBit(host) => {
            let moments = Moments {
                first: host.first.upload(&device),
                second: host.second.upload(&device),
            };
            let (value, moments) = reference::adamw_8bit(n, p.with(moments));
            let first = host.first.download(moments.first);
            let second = host.second.download(moments.second);
            (value, HostMoments::EightBit(Moments { first, second }))
        }
    };
    moments.pages(|bytes| paging.let_go(bytes));
    value
}

impl HostCodes<'_> {
    fn upload(&self, device: &Device) -> Codes {
        let codes = TensorData::new(self.codes.to_vec(), [self.codes.len()]);
        Codes {
            codes: Tensor::from_data(codes, (device, Codes::dtype(device))),
            absmax: upload(self.absmax, device),
        }
    }

    fn download(self, from: Codes) -> Self {
        let read = from.codes.into_data();
        for (to, code) in self.codes.iter_mut().zip(read.iter::<u8>()) {
            *to = code;
        }
        download(from.absmax, self.absmax);
        self
    }
}

fn upload(values: &[f32], device: &Device) -> Tensor<1> {
    let data = TensorData::new(values.to_vec(), [values.len()]);
    Tensor::from_data(data, (device, DType::F32))
}

fn download(from: Tensor<1>, to: &mut [f32]) {
    let read = from.into_data();
    for (to, value) in to.iter_mut().zip(read.iter::<f32>()) {
        *to = value;
    }
}
