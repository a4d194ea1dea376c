// SPDX-License-Identifier: Apache-2.0
//! The codec.

use bytes::{BufMut, Bytes, BytesMut};
use proptest::prelude::*;

use super::frame::*;
use crate::error::ProtocolError;

/// Each random byte takes Miri long.
const MOST_BYTES: usize = if cfg!(miri) { 30 } else { 300 };

pub(super) fn any_frame() -> impl Strategy<Value = Frame> {
    let stream = prop::sample::select(Stream::ALL.to_vec());
    let bytes = prop::collection::vec(any::<u8>(), 0..MOST_BYTES).prop_map(Bytes::from);
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

    /// What another version may mean by them is not guessed.
    #[test]
    fn reserved_bytes_in_use_are_refused_by_the_header(
        frame in any_frame(),
        reserved in (any::<u16>().prop_filter("zero", |bytes| *bytes != 0)).prop_map(u16::to_le_bytes),
    ) {
        let mut wire = BytesMut::from(&frame.encode()[..]);
        wire[2..4].copy_from_slice(&reserved);
        wire.truncate(HEADER);
        prop_assert_eq!(Frame::decode(&mut wire), Err(ProtocolError::Reserved(reserved)));
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
    for (kind, length) in [(4, MAX_DATA + 1), (10, 1), (7, 5), (1, 1025)] {
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
    let mut frame = BytesMut::from(&[5, 9, 0, 0, 0, 0, 0, 0][..]);
    assert_eq!(
        Frame::decode(&mut frame),
        Err(ProtocolError::UnknownStream(9))
    );
}

#[test]
fn a_full_data_frame_carries_64_kib() {
    let frame = Frame::Data(Stream::Output, Bytes::from(vec![0; MAX_DATA]));
    assert_eq!(frame.encode().len(), HEADER + 64 * 1024);
}

#[test]
fn a_frame_that_was_read_into_is_as_if_encoded() {
    let mut space = BytesMut::new();
    for payload in [&b"first"[..], b"second"] {
        let mut frame = Unsealed::with_room(&mut space, 100);
        frame.payload().extend_from_slice(payload);
        let sealed = frame.seal(Stream::Error, &mut space);
        assert_eq!(sealed, Frame::data(Stream::Error, payload));
    }
}

#[test]
fn what_is_missing_of_a_frame_is_known_from_its_header() {
    let frame = Frame::Data(Stream::Output, Bytes::from_static(b"abc")).encode();
    for (length, missing) in [(7, None), (8, Some(3)), (10, Some(1)), (11, Some(0))] {
        assert_eq!(Frame::missing(&frame[..length]), missing, "of {length}");
    }
    let mut promise = BytesMut::from(&frame[..4]);
    promise.put_u32_le(u32::MAX);
    assert_eq!(Frame::missing(&promise), None);
}
