//! Compressed streams, unpacked as they are read, within limits.
//!
//! A few kilobytes can stand for terabytes. What is unpacked is never held: it goes into chunks, of which zeros cost
//! nothing, or into a file whose zeros are holes. So the limits here are against endless work, and against a decoder that
//! asks for the memory that a header claims.

use std::cell::Cell;
use std::io::{self, Chain, Cursor, Read};
use std::path::Path;
use std::rc::Rc;

use flate2::read::MultiGzDecoder;
use liblzma::read::XzDecoder;
use liblzma::stream::{CONCATENATED, Stream};

use super::ImportError;
use super::format::Format;

/// Memory that a decoder may take. `xz -9` needs 65 MiB; `zstd --ultra -22` 128 MiB, which is zstd's own limit.
const DECODER_MEMORY: u64 = 128 << 20;

/// What any stream may unpack to. An empty disk of this size, however packed, costs a minute or two.
const FREE_SIZE: u64 = 256 << 30;

/// Beyond [`FREE_SIZE`], how many times its own length. Disks with something in them stay far below.
const MAX_RATIO: u64 = 1000;

/// Counts what is read through it.
pub(super) struct Counted<R> {
    inner: R,
    count: Rc<Cell<u64>>,
}

impl<R: Read> Counted<R> {
    pub(super) fn new(inner: R) -> (Self, Rc<Cell<u64>>) {
        let count = Rc::new(Cell::new(0));
        (Self { inner, count: Rc::clone(&count) }, count)
    }
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(bytes)?;
        self.count.set(self.count.get() + n as u64);
        Ok(n)
    }
}

/// More came out than any disk has.
#[derive(Debug, thiserror::Error)]
#[error("it unpacks to more than {unpacked} bytes")]
struct Bomb {
    unpacked: u64,
}

/// What comes out of a decoder, measured against what went in.
struct Bounded<R> {
    inner: R,
    packed: Rc<Cell<u64>>,
    unpacked: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(bytes)?;
        self.unpacked += n as u64;
        if self.unpacked > FREE_SIZE && self.unpacked / MAX_RATIO > self.packed.get() {
            return Err(io::Error::other(Bomb { unpacked: self.unpacked }));
        }
        Ok(n)
    }
}

/// The bytes that `packed`, of which `count` have been read, stands for, it being of the format `format`.
pub(super) fn unpack<'a>(
    packed: impl Read + 'a,
    format: Format,
    count: &Rc<Cell<u64>>,
) -> io::Result<Box<dyn Read + 'a>> {
    let inner: Box<dyn Read + 'a> = match format {
        Format::Gzip => Box::new(MultiGzDecoder::new(packed)),
        Format::Xz => {
            let stream = Stream::new_stream_decoder(DECODER_MEMORY, CONCATENATED)?;
            Box::new(XzDecoder::new_stream(packed, stream))
        }
        Format::Zstd => Box::new(zstd::stream::read::Decoder::new(packed)?),
        _ => Box::new(packed),
    };
    Ok(Box::new(Bounded { inner, packed: Rc::clone(count), unpacked: 0 }))
}

/// Why `path` cannot be read on; `packing` is how it is packed, if it is.
pub(super) fn failed(path: &Path, packing: Option<Format>) -> impl Fn(io::Error) -> ImportError {
    move |cause| {
        let path = path.to_owned();
        match packing {
            None => ImportError::Io { what: "read", path, cause },
            Some(_) if cause.get_ref().is_some_and(|inner| inner.is::<Bomb>()) => ImportError::Bomb { path },
            Some(packing) => ImportError::Packed { path, packing, cause },
        }
    }
}

/// A reader whose first bytes were read already.
pub(super) type Peeked<R> = Chain<Cursor<Vec<u8>>, R>;

/// The first `most` bytes of `reader`, or as many as there are, and a reader of all of them.
pub(super) fn peek<R: Read>(mut reader: R, most: usize) -> io::Result<(Vec<u8>, Peeked<R>)> {
    let mut head = Vec::with_capacity(most);
    reader.by_ref().take(most as u64).read_to_end(&mut head)?;
    Ok((head.clone(), Cursor::new(head).chain(reader)))
}

/// Reads until `bytes` are full or nothing follows; returns how many there were.
pub(super) fn read_full(reader: &mut dyn Read, bytes: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < bytes.len() {
        match reader.read(&mut bytes[len..]) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_unpacks_without_end_is_stopped() {
        // As if 300 GiB had come out of 1 MiB; really unpacking that takes minutes.
        let packed = Rc::new(Cell::new(1 << 20));
        let mut reader = Bounded { inner: io::repeat(0), packed: Rc::clone(&packed), unpacked: 300 << 30 };
        let error = failed(Path::new("bomb.xz"), Some(Format::Xz))(reader.read(&mut [0; 10]).unwrap_err());
        assert!(matches!(&error, ImportError::Bomb { .. }) && error.to_string().contains("bomb.xz"), "{error}");
        packed.set(1 << 30);
        assert_eq!(reader.read(&mut [0; 10]).unwrap(), 10, "a large disk that compresses well");
    }

    #[test]
    fn a_header_that_claims_a_huge_dictionary_gets_no_memory() {
        // A whole xz stream whose block header asks for a dictionary of 1 GiB.
        let mut options = liblzma::stream::LzmaOptions::new_preset(1).unwrap();
        options.dict_size(1 << 30);
        let mut filters = liblzma::stream::Filters::new();
        filters.lzma2(&options);
        let stream = Stream::new_stream_encoder(&filters, liblzma::stream::Check::Crc32).unwrap();
        let mut packed = Vec::new();
        liblzma::read::XzEncoder::new_stream(&b"x"[..], stream).read_to_end(&mut packed).unwrap();
        let (counted, count) = Counted::new(&packed[..]);
        let mut reader = unpack(counted, Format::Xz, &count).unwrap();
        let error = failed(Path::new("a.xz"), Some(Format::Xz))(reader.read(&mut [0; 10]).unwrap_err());
        assert!(matches!(error, ImportError::Packed { .. }), "{error}");
    }
}
