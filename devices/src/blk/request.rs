//! Requests of a driver: parsing, validation, and the steps that execute them (section 5.2.6).

use super::disk::Disk;
use super::{ID_SIZE, MAX_REQUEST, MAX_SEGMENT_SECTORS, MAX_SEGMENTS, SECTOR_SIZE};
use crate::fault::guest_fault;
use crate::virtio::{Chain, ChainError, Memory};
use rustix::fs::FallocateFlags;
use std::io;
use virtio_bindings::virtio_blk::*;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Size of the status in bytes.
const STATUS_SIZE: u32 = 1;

/// Header of a request (`struct virtio_blk_req`).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    kind: U32,
    reserved: U32,
    sector: U64,
}

/// One range of a discard or write-zeroes request (`struct virtio_blk_discard_write_zeroes`).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Segment {
    sector: U64,
    sectors: U32,
    flags: U32,
}

const HEADER_SIZE: u32 = size_of::<Header>() as u32;
const SEGMENT_SIZE: u32 = size_of::<Segment>() as u32;

/// Status of a completed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = VIRTIO_BLK_S_OK as u8,
    IoError = VIRTIO_BLK_S_IOERR as u8,
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// The next step of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Read from the file into the chain's writable part, from its start.
    Read { skip: u32, len: u32, at: u64 },
    /// Write the chain's readable part to the file.
    Write { skip: u32, len: u32, at: u64 },
    /// Flush earlier writes to stable storage.
    Sync,
    /// fallocate(2).
    Allocate {
        mode: FallocateFlags,
        at: u64,
        len: u64,
    },
}

/// A validated request and its progress.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) chain: Chain,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Read {
        at: u64,
        len: u32,
        done: u32,
    },
    Write {
        at: u64,
        len: u32,
        done: u32,
    },
    Flush,
    /// Remaining steps, last first.
    Ranges {
        todo: Vec<Step>,
        zeroed: u64,
    },
}

/// The result of parsing a chain.
#[derive(Debug)]
pub(super) enum Parsed {
    /// A request to be executed.
    Request(Request),
    /// An immediate answer: the chain, the status, and the number of data bytes written.
    Completed(Chain, Status, u32),
}

impl Request {
    /// Validates a chain. With `durable`, its writes must be on stable storage when it is completed.
    ///
    /// # Errors
    /// If it has no header or no space for a status, and thus cannot even fail with an error.
    pub(super) fn parse(
        chain: Chain,
        memory: &Memory,
        disk: &Disk,
        durable: bool,
    ) -> Result<Parsed, ChainError> {
        let mut header = Header::new_zeroed();
        chain.read(memory, 0, header.as_mut_bytes())?;
        let room = chain
            .writable_len()
            .checked_sub(STATUS_SIZE)
            .ok_or(ChainError::TooShort)?;
        let given = chain.readable_len() - HEADER_SIZE;
        let sector = header.sector.get();
        let kind = match header.kind.get() {
            VIRTIO_BLK_T_IN => byte_range(disk, sector, room).map(|at| Kind::Read {
                at,
                len: room,
                done: 0,
            }),
            VIRTIO_BLK_T_GET_ID => {
                let len = room.min(ID_SIZE as u32);
                chain.write(memory, 0, &disk.id()[..len as usize])?;
                return Ok(Parsed::Completed(chain, Status::Ok, len));
            }
            VIRTIO_BLK_T_FLUSH => Ok(Kind::Flush),
            _ if disk.is_read_only() => Err(Status::IoError),
            VIRTIO_BLK_T_OUT => byte_range(disk, sector, given).map(|at| Kind::Write {
                at,
                len: given,
                done: 0,
            }),
            kind @ (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) => {
                let discard = kind == VIRTIO_BLK_T_DISCARD;
                let steps = ranges(&chain, memory, disk, given, discard)?;
                steps.map(|mut todo| {
                    let zeroed = todo.iter().map(Step::written).sum();
                    if durable {
                        todo.insert(0, Step::Sync);
                    }
                    Kind::Ranges { todo, zeroed }
                })
            }
            _ => Err(Status::Unsupported),
        };
        Ok(match kind {
            Ok(kind) => Parsed::Request(Self { chain, kind }),
            Err(status) => Parsed::Completed(chain, status, 0),
        })
    }

    /// Whether it counts as a read.
    pub(super) fn is_read(&self) -> bool {
        matches!(self.kind, Kind::Read { .. })
    }

    /// Whether it counts as a write.
    pub(super) fn is_write(&self) -> bool {
        matches!(self.kind, Kind::Write { .. })
    }

    /// Whether it counts as a flush.
    pub(super) fn is_flush(&self) -> bool {
        matches!(self.kind, Kind::Flush)
    }

    /// Bytes for rate limits and metrics; zeroes that must be written count, holes do not.
    pub(super) fn bytes(&self) -> u64 {
        match self.kind {
            Kind::Read { len, .. } | Kind::Write { len, .. } => len.into(),
            Kind::Ranges { zeroed, .. } => zeroed,
            Kind::Flush => 0,
        }
    }

    /// The next step; `None` if all are done.
    pub(super) fn step(&self) -> Option<Step> {
        match &self.kind {
            Kind::Read { at, len, done } => (done < len).then(|| Step::Read {
                skip: *done,
                len: len - done,
                at: at + u64::from(*done),
            }),
            Kind::Write { at, len, done } => (done < len).then(|| Step::Write {
                skip: HEADER_SIZE + done,
                len: len - done,
                at: at + u64::from(*done),
            }),
            Kind::Flush => Some(Step::Sync),
            Kind::Ranges { todo, .. } => todo.last().copied(),
        }
    }

    /// Takes the result of a step: number of bytes, or the host's error. Returns `None` if there is another
    /// step.
    pub(super) fn advance(&mut self, result: io::Result<u32>) -> Option<Status> {
        let got = match result {
            Ok(got) => got,
            // Not supported by the host's file system: the driver writes zeroes itself, or does without.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                return Some(Status::Unsupported);
            }
            Err(error) => {
                guest_fault!("a disk's request failed: {error}");
                return Some(Status::IoError);
            }
        };
        match &mut self.kind {
            // The file is shorter than the disk: it has been truncated.
            Kind::Read { .. } | Kind::Write { .. } if got == 0 => return Some(Status::IoError),
            Kind::Read { done, .. } | Kind::Write { done, .. } => *done += got,
            Kind::Flush => return Some(Status::Ok),
            Kind::Ranges { todo, .. } => {
                todo.pop();
            }
        }
        self.step().is_none().then_some(Status::Ok)
    }

    /// Number of data bytes in the chain's writable part.
    pub(super) fn written(&self) -> u32 {
        match self.kind {
            Kind::Read { done, .. } => done,
            _ => 0,
        }
    }
}

/// Writes the status of a chain; returns the length for the used ring.
pub(super) fn write_status(
    chain: &Chain,
    memory: &Memory,
    status: Status,
    written: u32,
) -> Result<u32, ChainError> {
    let last = chain.writable_len() - STATUS_SIZE;
    chain.write(memory, last, &[status as u8])?;
    // Section 2.7.8: the used length counts contiguous bytes from the start; after a partial transfer only
    // the status behind the data was written.
    Ok(if written == last {
        written + STATUS_SIZE
    } else {
        written
    })
}

/// Byte offset of `len` bytes from `sector` on, if they are within the disk and whole blocks.
fn byte_range(disk: &Disk, sector: u64, len: u32) -> Result<u64, Status> {
    let block = u64::from(disk.block_size());
    let len = u64::from(len);
    let at = sector.checked_mul(SECTOR_SIZE).ok_or(Status::IoError)?;
    let end = at.checked_add(len).ok_or(Status::IoError)?;
    let size = disk.sectors() * SECTOR_SIZE;
    if len == 0
        || len > MAX_REQUEST
        || end > size
        || !at.is_multiple_of(block)
        || !len.is_multiple_of(block)
    {
        return Err(Status::IoError);
    }
    Ok(at)
}

impl Step {
    /// Number of zero bytes that the host must write for it.
    fn written(&self) -> u64 {
        match self {
            Self::Allocate { mode, len, .. } if mode.contains(FallocateFlags::ZERO_RANGE) => *len,
            _ => 0,
        }
    }
}

/// The steps of a discard or write-zeroes request, last first.
fn ranges(
    chain: &Chain,
    memory: &Memory,
    disk: &Disk,
    given: u32,
    discard: bool,
) -> Result<Result<Vec<Step>, Status>, ChainError> {
    if given == 0 || !given.is_multiple_of(SEGMENT_SIZE) || given / SEGMENT_SIZE > MAX_SEGMENTS {
        return Ok(Err(Status::IoError));
    }
    let mut todo = Vec::new();
    for index in (0..given / SEGMENT_SIZE).rev() {
        let mut segment = Segment::new_zeroed();
        let offset = HEADER_SIZE + index * SEGMENT_SIZE;
        chain.read(memory, offset, segment.as_mut_bytes())?;
        let unmap = segment.flags.get() & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        let unknown = segment.flags.get() & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        if unknown || (discard && unmap) {
            return Ok(Err(Status::Unsupported));
        }
        let (sector, sectors) = (segment.sector.get(), u64::from(segment.sectors.get()));
        let inside = sector
            .checked_add(sectors)
            .is_some_and(|end| end <= disk.sectors());
        if !inside || sectors == 0 || sectors > u64::from(MAX_SEGMENT_SECTORS) {
            return Ok(Err(Status::IoError));
        }
        let mode = match discard || unmap {
            true => FallocateFlags::PUNCH_HOLE,
            false => FallocateFlags::ZERO_RANGE,
        };
        let (at, len) = (sector * SECTOR_SIZE, sectors * SECTOR_SIZE);
        let block = u64::from(disk.block_size());
        if !at.is_multiple_of(block) || !len.is_multiple_of(block) {
            return Ok(Err(Status::IoError));
        }
        todo.push(Step::Allocate {
            mode: mode | FallocateFlags::KEEP_SIZE,
            at,
            len,
        });
    }
    Ok(Ok(todo))
}
