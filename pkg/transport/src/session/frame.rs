// SPDX-License-Identifier: Apache-2.0
//! The wire format: an 8-byte header (kind, stream, two reserved bytes that are
//! zero, payload length as u32, little-endian) and the payload.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::error::ProtocolError;

/// Version of the protocol, sent in HELLO.
pub(crate) const VERSION: u16 = 1;
/// Bytes of a header.
pub(crate) const HEADER: usize = 8;
/// Most payload of a DATA frame: what a full pipe gives at once.
pub(crate) const MAX_DATA: usize = 64 * 1024;
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

    /// A DATA frame's bytes; the payload is copied once.
    pub(crate) fn data(stream: Stream, payload: &[u8]) -> Bytes {
        encode(DATA, stream as u8, payload)
    }

    /// How much is still missing of the first frame in `buffer`; `None` if its
    /// header is not there yet, or cannot be right.
    pub(crate) fn missing(buffer: &[u8]) -> Option<usize> {
        let header = buffer.get(..HEADER)?;
        let size = (&header[4..]).get_u32_le() as usize;
        let size = limit(header[0])
            .ok()
            .filter(|limit| size <= *limit)
            .map(|_| size)?;
        Some((HEADER + size).saturating_sub(buffer.len()))
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
        let reserved = [header[2], header[3]];
        if reserved != [0, 0] {
            return Err(ProtocolError::Reserved(reserved));
        }
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
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    frame.put_slice(&header(kind, stream, length));
    frame.put_slice(payload);
    frame.freeze()
}

/// A DATA frame whose payload is received straight into it.
#[derive(Debug)]
pub(crate) struct Unsealed(BytesMut);

impl Unsealed {
    /// With room for `room` bytes, at most [`MAX_DATA`], in `space` if that has it.
    pub(crate) fn with_room(space: &mut BytesMut, room: usize) -> Self {
        space.clear();
        space.reserve(HEADER + room);
        space.put_bytes(0, HEADER);
        Self(std::mem::take(space))
    }

    /// Where the payload goes.
    pub(crate) fn payload(&mut self) -> &mut BytesMut {
        &mut self.0
    }

    /// The frame's bytes; `space` gets back what they do not need.
    pub(crate) fn seal(mut self, stream: Stream, space: &mut BytesMut) -> Bytes {
        let length = u32::try_from(self.0.len() - HEADER).unwrap_or(u32::MAX);
        (&mut self.0[..HEADER]).put_slice(&header(DATA, stream as u8, length));
        let frame = self.0.split().freeze();
        *space = self.0;
        frame
    }
}

fn header(kind: u8, stream: u8, length: u32) -> [u8; HEADER] {
    let [a, b, c, d] = length.to_le_bytes();
    [kind, stream, 0, 0, a, b, c, d]
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
