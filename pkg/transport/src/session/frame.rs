// SPDX-License-Identifier: Apache-2.0
//! The wire format: an 8-byte header (kind, stream, two reserved bytes, payload
//! length as u32, little-endian) and the payload.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::error::ProtocolError;
use crate::transport::MAX_WRITE;

/// Version of the protocol, sent in HELLO.
pub(crate) const VERSION: u16 = 1;
/// Bytes of a header.
pub(crate) const HEADER: usize = 8;
/// Most payload of a DATA frame: with its header it fits one write.
pub(crate) const MAX_DATA: usize = MAX_WRITE - HEADER;
/// Most payload of any other frame.
pub(crate) const MAX_CONTROL: usize = 1024;
/// What a receiver allows a sender at first, per stream, and at most.
pub(crate) const WINDOW: usize = 256 * 1024;

/// One direction of bytes within a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Stream {
    Input = 0,
    Output = 1,
    Error = 2,
}

impl Stream {
    pub(crate) const ALL: [Self; 3] = [Self::Input, Self::Output, Self::Error];

    fn parse(byte: u8) -> Result<Self, ProtocolError> {
        Self::ALL
            .into_iter()
            .find(|stream| *stream as u8 == byte)
            .ok_or(ProtocolError::UnknownStream(byte))
    }
}

/// A frame as received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Frame {
    /// Opens a session; the payload is [`super::open`]'s.
    Hello(Bytes),
    /// The session is accepted.
    Accept,
    /// It is not; why, in words.
    Refuse(String),
    /// Bytes of a stream.
    Data(Stream, Bytes),
    /// The sender has sent all of a stream.
    Eof(Stream),
    /// The sender of a stream is gone without having sent all of it.
    Abort(Stream),
    /// The receiver allows this many more bytes.
    Credit(Stream, usize),
    /// Nobody reads the stream any more.
    Stop(Stream),
    /// The process ended with this code; the last thing a guest says.
    Exit(u8),
    /// The sender is done with the session.
    Close,
}

const HELLO: u8 = 1;
const ACCEPT: u8 = 2;
const REFUSE: u8 = 3;
const DATA: u8 = 4;
const EOF: u8 = 5;
const ABORT: u8 = 6;
const CREDIT: u8 = 7;
const STOP: u8 = 8;
const EXIT: u8 = 9;
const CLOSE: u8 = 10;

impl Frame {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "HELLO",
            Self::Accept => "ACCEPT",
            Self::Refuse(_) => "REFUSE",
            Self::Data(..) => "DATA",
            Self::Eof(_) => "EOF",
            Self::Abort(_) => "ABORT",
            Self::Credit(..) => "CREDIT",
            Self::Stop(_) => "STOP",
            Self::Exit(_) => "EXIT",
            Self::Close => "CLOSE",
        }
    }

    /// The frame's bytes. A payload that is too long is cut (words) or must not
    /// be given (data: callers ask for at most [`MAX_DATA`]).
    pub(crate) fn encode(&self) -> Bytes {
        match self {
            Self::Hello(payload) => encode(HELLO, 0, payload),
            Self::Accept => encode(ACCEPT, 0, &[]),
            Self::Refuse(reason) => {
                let cut = reason.floor_char_boundary(MAX_CONTROL);
                encode(REFUSE, 0, &reason.as_bytes()[..cut])
            }
            Self::Data(stream, payload) => encode(DATA, *stream as u8, payload),
            Self::Eof(stream) => encode(EOF, *stream as u8, &[]),
            Self::Abort(stream) => encode(ABORT, *stream as u8, &[]),
            Self::Credit(stream, bytes) => {
                let bytes = u32::try_from(*bytes).unwrap_or(u32::MAX);
                encode(CREDIT, *stream as u8, &bytes.to_le_bytes())
            }
            Self::Stop(stream) => encode(STOP, *stream as u8, &[]),
            Self::Exit(code) => encode(EXIT, 0, &[*code]),
            Self::Close => encode(CLOSE, 0, &[]),
        }
    }

    /// Takes the first frame out of `buffer`; `None` if it is not complete yet.
    ///
    /// A header that cannot be right is an error before its payload is awaited,
    /// so a peer cannot make this side wait for, or keep, more than a frame.
    pub(crate) fn decode(buffer: &mut BytesMut) -> Result<Option<Self>, ProtocolError> {
        let Some(header) = buffer.get(..HEADER) else {
            return Ok(None);
        };
        let (kind, stream) = (header[0], header[1]);
        let length = (&header[4..HEADER]).get_u32_le();
        let limit = limit(kind)?;
        let size = length as usize;
        if size > limit {
            let limit = u32::try_from(limit).unwrap_or(u32::MAX);
            return Err(ProtocolError::TooLong { length, limit });
        }
        if buffer.len() < HEADER + size {
            return Ok(None);
        }
        buffer.advance(HEADER);
        parse(kind, stream, buffer.split_to(size).freeze()).map(Some)
    }
}

fn encode(kind: u8, stream: u8, payload: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(HEADER + payload.len());
    frame.put_u8(kind);
    frame.put_u8(stream);
    frame.put_u16(0);
    frame.put_u32_le(u32::try_from(payload.len()).unwrap_or(u32::MAX));
    frame.put_slice(payload);
    frame.freeze()
}

/// Most payload that a frame of `kind` may have.
fn limit(kind: u8) -> Result<usize, ProtocolError> {
    match kind {
        DATA => Ok(MAX_DATA),
        HELLO | REFUSE => Ok(MAX_CONTROL),
        CREDIT => Ok(4),
        EXIT => Ok(1),
        ACCEPT | EOF | ABORT | STOP | CLOSE => Ok(0),
        unknown => Err(ProtocolError::UnknownKind(unknown)),
    }
}

fn parse(kind: u8, stream: u8, mut payload: Bytes) -> Result<Frame, ProtocolError> {
    Ok(match kind {
        HELLO => Frame::Hello(payload),
        ACCEPT => Frame::Accept,
        REFUSE => Frame::Refuse(String::from_utf8_lossy(&payload).into_owned()),
        DATA => Frame::Data(Stream::parse(stream)?, payload),
        EOF => Frame::Eof(Stream::parse(stream)?),
        ABORT => Frame::Abort(Stream::parse(stream)?),
        CREDIT => {
            let bytes = payload
                .try_get_u32_le()
                .map_err(|_| ProtocolError::Malformed("CREDIT"))?;
            Frame::Credit(Stream::parse(stream)?, bytes as usize)
        }
        STOP => Frame::Stop(Stream::parse(stream)?),
        EXIT => Frame::Exit(
            payload
                .try_get_u8()
                .map_err(|_| ProtocolError::Malformed("EXIT"))?,
        ),
        CLOSE => Frame::Close,
        unknown => return Err(ProtocolError::UnknownKind(unknown)),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_frame() -> impl Strategy<Value = Frame> {
        let stream = prop::sample::select(Stream::ALL.to_vec());
        let bytes = prop::collection::vec(any::<u8>(), 0..300).prop_map(Bytes::from);
        prop_oneof![
            bytes.clone().prop_map(Frame::Hello),
            Just(Frame::Accept),
            "[a-zü ]{0,80}".prop_map(Frame::Refuse),
            (stream.clone(), bytes).prop_map(|(stream, bytes)| Frame::Data(stream, bytes)),
            stream.clone().prop_map(Frame::Eof),
            stream.clone().prop_map(Frame::Abort),
            (stream.clone(), 0..WINDOW).prop_map(|(stream, bytes)| Frame::Credit(stream, bytes)),
            stream.prop_map(Frame::Stop),
            any::<u8>().prop_map(Frame::Exit),
            Just(Frame::Close),
        ]
    }

    proptest! {
        /// Frames survive however the bytes are cut on the way.
        #[test]
        fn any_split_decodes_to_the_same_frames(
            frames in prop::collection::vec(any_frame(), 1..12),
            chunk in 1usize..64,
        ) {
            let wire: Vec<u8> = frames.iter().flat_map(|frame| frame.encode()).collect();
            let mut buffer = BytesMut::new();
            let mut decoded = Vec::new();
            for piece in wire.chunks(chunk) {
                buffer.extend_from_slice(piece);
                while let Some(frame) = Frame::decode(&mut buffer).unwrap() {
                    decoded.push(frame);
                }
            }
            prop_assert_eq!(decoded, frames);
            prop_assert!(buffer.is_empty());
        }

        /// Garbage is an error or a wait for at most one frame, never a panic.
        #[test]
        fn garbage_never_panics_nor_waits_for_much(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = Frame::decode(&mut buffer) {}
            prop_assert!(buffer.len() <= bytes.len());
        }
    }

    #[test]
    fn a_frame_that_is_too_long_is_refused_by_its_header() {
        for (kind, length) in [(DATA, MAX_DATA + 1), (CLOSE, 1), (CREDIT, 5), (HELLO, 1025)] {
            let mut header = BytesMut::new();
            header.put_slice(&[kind, 0, 0, 0]);
            header.put_u32_le(u32::try_from(length).unwrap());
            assert!(
                matches!(
                    Frame::decode(&mut header),
                    Err(ProtocolError::TooLong { .. })
                ),
                "{kind}"
            );
        }
    }

    #[test]
    fn an_unknown_kind_is_refused_by_its_header() {
        let mut header = BytesMut::from(&[77, 0, 0, 0, 255, 255, 255, 255][..]);
        assert_eq!(
            Frame::decode(&mut header),
            Err(ProtocolError::UnknownKind(77))
        );
    }

    #[test]
    fn an_unknown_stream_is_refused() {
        let mut frame = BytesMut::from(&[EOF, 9, 0, 0, 0, 0, 0, 0][..]);
        assert_eq!(
            Frame::decode(&mut frame),
            Err(ProtocolError::UnknownStream(9))
        );
    }

    #[test]
    fn a_full_data_frame_fits_one_write() {
        let frame = Frame::Data(Stream::Output, Bytes::from(vec![0; MAX_DATA]));
        assert_eq!(frame.encode().len(), MAX_WRITE);
    }
}
