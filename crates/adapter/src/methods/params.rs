//! A parameter of any rank, to read or to change.

use burn::module::{Param, ParamId};
use burn::tensor::{Tensor, TensorData};

use crate::base::to_host;
use crate::error::Result;

/// A parameter of any rank, to read.
pub enum ParamRef<'a> {
    /// Of one axis.
    Vector(&'a Param<Tensor<1>>),
    /// Of two axes.
    Matrix(&'a Param<Tensor<2>>),
    /// Of three axes: matrices in a row.
    Blocks(&'a Param<Tensor<3>>),
    /// Of four axes.
    Rank4(&'a Param<Tensor<4>>),
}

/// A parameter of any rank, to change.
pub enum ParamMut<'a> {
    /// Of one axis.
    Vector(&'a mut Param<Tensor<1>>),
    /// Of two axes.
    Matrix(&'a mut Param<Tensor<2>>),
    /// Of three axes: matrices in a row.
    Blocks(&'a mut Param<Tensor<3>>),
    /// Of four axes.
    Rank4(&'a mut Param<Tensor<4>>),
}

macro_rules! of_rank {
    ($($rank:literal => $kind:ident),+) => {$(
        impl<'a> From<&'a Param<Tensor<$rank>>> for ParamRef<'a> {
            fn from(param: &'a Param<Tensor<$rank>>) -> Self {
                Self::$kind(param)
            }
        }

        impl<'a> From<&'a mut Param<Tensor<$rank>>> for ParamMut<'a> {
            fn from(param: &'a mut Param<Tensor<$rank>>) -> Self {
                Self::$kind(param)
            }
        }
    )+};
}
of_rank!(1 => Vector, 2 => Matrix, 3 => Blocks, 4 => Rank4);

impl ParamRef<'_> {
    /// Its id.
    pub fn id(&self) -> ParamId {
        match self {
            Self::Vector(p) => p.id,
            Self::Matrix(p) => p.id,
            Self::Blocks(p) => p.id,
            Self::Rank4(p) => p.id,
        }
    }

    /// Its shape.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Self::Vector(p) => p.dims().to_vec(),
            Self::Matrix(p) => p.dims().to_vec(),
            Self::Blocks(p) => p.dims().to_vec(),
            Self::Rank4(p) => p.dims().to_vec(),
        }
    }

    /// Its values as f32, row-major.
    pub fn read(&self, name: &str) -> Result<Vec<f32>> {
        match self {
            Self::Vector(p) => to_host(name, p.val()),
            Self::Matrix(p) => to_host(name, p.val()),
            Self::Blocks(p) => to_host(name, p.val()),
            Self::Rank4(p) => to_host(name, p.val()),
        }
    }

    /// Its gradient as f32, row-major; `None` if the backward pass did not reach it.
    pub fn gradient(
        &self,
        name: &str,
        grads: &burn::tensor::Gradients,
    ) -> Result<Option<Vec<f32>>> {
        match self {
            Self::Vector(p) => p.val().grad(grads).map(|g| to_host(name, g)).transpose(),
            Self::Matrix(p) => p.val().grad(grads).map(|g| to_host(name, g)).transpose(),
            Self::Blocks(p) => p.val().grad(grads).map(|g| to_host(name, g)).transpose(),
            Self::Rank4(p) => p.val().grad(grads).map(|g| to_host(name, g)).transpose(),
        }
    }
}

impl ParamMut<'_> {
    /// The same parameter, to read.
    pub fn as_ref(&self) -> ParamRef<'_> {
        match self {
            Self::Vector(p) => ParamRef::Vector(p),
            Self::Matrix(p) => ParamRef::Matrix(p),
            Self::Blocks(p) => ParamRef::Blocks(p),
            Self::Rank4(p) => ParamRef::Rank4(p),
        }
    }

    /// Replaces the values (as many as the shape holds); id and trainability stay.
    pub(crate) fn write(&mut self, values: Vec<f32>) {
        match self {
            Self::Vector(p) => replace(p, values),
            Self::Matrix(p) => replace(p, values),
            Self::Blocks(p) => replace(p, values),
            Self::Rank4(p) => replace(p, values),
        }
    }
}

fn replace<const D: usize>(param: &mut Param<Tensor<D>>, values: Vec<f32>) {
    let data = TensorData::new(values, param.dims());
    // `map` keeps the id and what `train` restores.
    *param = param.clone().map(|old| {
        let new = Tensor::from_data(data, (&old.device(), old.dtype()));
        if old.is_require_grad() {
            new.require_grad()
        } else {
            new
        }
    });
}
