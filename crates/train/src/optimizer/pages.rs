//! Paged moments: a file of the run directory, mapped into memory, of which a step has only the pages in
//! memory that it is working on. The system may write the rest to the disk and use its memory.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{Bytes, Tensor};
use enamel_kernels::{HostCodes, HostMoments, MOMENT_BLOCK, Moments, Paging};
use memmap2::{MmapMut, MmapOptions};
use tempfile::TempPath;

use super::Optim;
use crate::error::TrainError;
use crate::text::bytes_text;

/// How the file's name begins, as long as it has one; the id of the run comes next.
pub(crate) const PAGES: &str = ".optimizer-";

/// The file, and the room in it for each large parameter.
#[derive(Debug)]
pub(super) struct Pages {
    rooms: HashMap<ParamId, Room>,
    /// Removes the file when the rooms are gone, where a system cannot do without its name earlier.
    _name: Option<TempPath>,
}

/// The moments of one parameter.
#[derive(Debug)]
pub(super) struct Room {
    elements: usize,
    maps: Moments<Mapped>,
    /// The scales of moments in 8 bits, which are few and stay in memory.
    absmax: Option<Moments<Vec<f32>>>,
    /// Whether it may hold something else than zeros.
    used: bool,
}

/// A part of the file.
#[derive(Debug)]
pub(super) struct Mapped {
    map: MmapMut,
    place: Place,
}

/// Where in the file a moment is.
#[derive(Clone, Debug)]
pub(super) struct Place {
    file: Arc<File>,
    offset: u64,
    len: usize,
}

impl Pages {
    /// A file in `dir`, named after `run`, with room for the moments that `optim` pages of `model`; none if there are no such.
    ///
    /// # Errors
    /// When the disk refuses or has not enough space.
    pub(super) fn new<M: Module>(
        optim: Optim,
        (dir, run): (&Path, &str),
        model: &M,
    ) -> Result<Option<Self>, TrainError> {
        let mut large = Large {
            optim,
            found: Vec::new(),
        };
        model.visit(&mut large);
        if large.found.is_empty() {
            return Ok(None);
        }
        let per_element = |elements| match optim.is_8bit(elements) {
            true => 1,
            false => size_of::<f32>(),
        };
        let page = page_size();
        let room = |elements: usize| (elements * per_element(elements)).next_multiple_of(page);
        let total: usize = large.found.iter().map(|(_, n)| 2 * room(*n)).sum();

        fs::create_dir_all(dir).map_err(TrainError::io(dir, "creating the folder"))?;
        let prefix = format!("{PAGES}{run}-");
        let named = tempfile::Builder::new()
            .prefix(&prefix)
            .tempfile_in(dir)
            .map_err(TrainError::io(
                dir,
                "creating the file of paged moments in it",
            ))?;
        let (file, name) = named.into_parts();
        // A file that is open needs no name here, and one without is gone however the run ends.
        let name = match cfg!(unix) {
            true => name.close().map(|()| None),
            false => Ok(Some(name)),
        };
        let name = name.map_err(TrainError::io(
            dir,
            "creating the file of paged moments in it",
        ))?;
        reserve(&file, total).map_err(|error| TrainError::Run {
            path: dir.to_path_buf(),
            reason: format!(
                "no room in it for the {} of moments that {optim} pages: {error}",
                bytes_text(total)
            ),
            help: "make room there, write to another disk with output.dir, or choose \
                   train.optim = \"adamw_8bit\""
                .into(),
        })?;

        let file = Arc::new(file);
        let mut offset = 0;
        let mut rooms = HashMap::with_capacity(large.found.len());
        for (id, elements) in large.found {
            let mut map = || {
                let place = Place {
                    file: file.clone(),
                    offset,
                    len: elements * per_element(elements),
                };
                offset += room(elements) as u64;
                let map = place.map_mut();
                map.map(|map| Mapped { map, place }).map_err(TrainError::io(
                    dir,
                    "mapping the file of paged moments in it",
                ))
            };
            let maps = Moments {
                first: map()?,
                second: map()?,
            };
            let scales = || vec![0.0; elements.div_ceil(MOMENT_BLOCK)];
            let absmax = optim.is_8bit(elements).then(|| Moments {
                first: scales(),
                second: scales(),
            });
            let room = Room {
                elements,
                maps,
                absmax,
                used: false,
            };
            rooms.insert(id, room);
        }
        Ok(Some(Self { rooms, _name: name }))
    }

    /// The room of a parameter.
    pub(super) fn get(&self, id: ParamId) -> Option<&Room> {
        self.rooms.get(&id)
    }

    /// The same, to be filled.
    pub(super) fn get_mut(&mut self, id: ParamId) -> Option<&mut Room> {
        self.rooms.get_mut(&id)
    }

    /// All rooms.
    pub(super) fn rooms(&mut self) -> HashMap<ParamId, &mut Room> {
        self.rooms.iter_mut().map(|(id, r)| (*id, r)).collect()
    }
}

impl Room {
    /// Elements of the parameter.
    pub(super) fn elements(&self) -> usize {
        self.elements
    }

    /// Makes the moments zero, as they are before the first step.
    pub(super) fn clear(&mut self) {
        if std::mem::replace(&mut self.used, false) {
            for map in [&mut self.maps.first, &mut self.maps.second] {
                map.map.fill(0);
            }
            if let Some(Moments { first, second }) = &mut self.absmax {
                first.fill(0.0);
                second.fill(0.0);
            }
        }
    }

    /// The moments, to be updated.
    pub(super) fn moments(&mut self) -> HostMoments<'_> {
        self.used = true;
        let Moments { first, second } = &mut self.maps;
        let bytes = Moments { first, second }.map(|mapped| &mut mapped.map[..]);
        match &mut self.absmax {
            // Mapped memory begins at a page.
            None => HostMoments::F32(bytes.map(floats)),
            Some(absmax) => HostMoments::EightBit(Moments {
                first: HostCodes {
                    codes: bytes.first,
                    absmax: &mut absmax.first,
                },
                second: HostCodes {
                    codes: bytes.second,
                    absmax: &mut absmax.second,
                },
            }),
        }
    }

    /// Where the moments, or their codes, are in the file.
    pub(super) fn places(&self) -> Moments<Place> {
        Moments {
            first: self.maps.first.place.clone(),
            second: self.maps.second.place.clone(),
        }
    }

    /// The scales of moments in 8 bits.
    pub(super) fn absmax(&self) -> Option<&Moments<Vec<f32>>> {
        self.absmax.as_ref()
    }
}

/// Mapped bytes as the numbers they are.
fn floats(bytes: &mut [u8]) -> &mut [f32] {
    // SAFETY: every pattern of bits is an f32.
    let (before, numbers, after) = unsafe { bytes.align_to_mut::<f32>() };
    debug_assert!(before.is_empty() && after.is_empty());
    numbers
}

impl Place {
    /// Bytes of the moment.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    fn map_mut(&self) -> std::io::Result<MmapMut> {
        let mut options = MmapOptions::new();
        let options = options.offset(self.offset).len(self.len);
        // SAFETY: the file has no name, or one that only this process knows, and every place in it is handed
        // out once to be written; its length never changes.
        unsafe { options.map_mut(&*self.file) }
    }

    /// A copy of what is there.
    pub(super) fn read(&self) -> std::io::Result<Bytes> {
        let mut options = MmapOptions::new();
        let options = options.offset(self.offset).len(self.len);
        // SAFETY: as above; nothing steps while moments are saved.
        let map = unsafe { options.map(&*self.file) }?;
        Ok(Bytes::from_bytes_vec(map.to_vec()))
    }
}

/// The parameters whose moments are paged.
struct Large {
    optim: Optim,
    found: Vec<(ParamId, usize)>,
}

impl ModuleVisitor for Large {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let elements = param.lazy_shape().num_elements();
        if param.is_require_grad() && self.optim.is_paged(elements) {
            self.found.push((param.id, elements));
        }
    }
}

/// Asks the system for the pages of a step, and hands them back.
pub(super) struct Pager;

#[cfg(unix)]
impl Paging for Pager {
    fn bring_in(&self, bytes: &[u8]) {
        // In one call instead of a fault a page. Older systems refuse, and bring in page by page.
        #[cfg(target_os = "linux")]
        advise(bytes, libc::MADV_POPULATE_WRITE);
        #[cfg(not(target_os = "linux"))]
        advise(bytes, libc::MADV_WILLNEED);
    }

    fn let_go(&self, bytes: &[u8]) {
        advise(bytes, libc::MADV_DONTNEED);
    }
}

#[cfg(not(unix))]
impl Paging for Pager {
    fn bring_in(&self, _: &[u8]) {}
    fn let_go(&self, _: &[u8]) {}
}

/// Advice on all pages that `bytes` touch. What the system answers changes no result.
#[cfg(unix)]
fn advise(bytes: &[u8], advice: libc::c_int) {
    if bytes.is_empty() {
        return;
    }
    let within = bytes.as_ptr().addr() % page_size();
    let start = bytes.as_ptr().wrapping_sub(within);
    // SAFETY: the pages are of a file that is mapped shared: bringing them in changes nothing in them, and
    // pages let go of are read again from the file, also by a neighbour who is still at work in one.
    unsafe { libc::madvise(start.cast_mut().cast(), bytes.len() + within, advice) };
}

#[cfg(unix)]
fn page_size() -> usize {
    // SAFETY: reads a number.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(1 << 16).max(1)
}

#[cfg(not(unix))]
fn page_size() -> usize {
    1 << 16
}

/// Fills the file with zeros: a page that found no space on the disk later would end the process. To reserve
/// the blocks without writing them makes every first write of a page dear on ext4.
fn reserve(mut file: &File, bytes: usize) -> std::io::Result<()> {
    let zeros = vec![0; bytes.min(1 << 20)];
    let mut left = bytes;
    while left > 0 {
        let now = left.min(zeros.len());
        file.write_all(&zeros[..now])?;
        left -= now;
    }
    Ok(())
}
