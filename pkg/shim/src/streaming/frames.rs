// SPDX-License-Identifier: Apache-2.0
//! One stream on the wire: ttrpc's frames, and in each an Any with one of
//! containerd's messages (`services/streaming/v1`, `types/transfer`).
//!
//! The frames are read and written here and not by the `ttrpc` crate's server:
//! 0.10 handles each data frame in a task of its own, so that they may change
//! places and a stream's end may overtake its bytes, and it tells a handler
//! nothing of a connection that is lost.
//!
//! The messages have one field each, so they are declared by hand: generated
//! ones would need copies of containerd's files.

use std::io;

use prost::Message as _;
use prost::bytes::Bytes;
use tokio::io::{AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use ttrpc::proto::{
    Codec as _, FLAG_NO_DATA, FLAG_REMOTE_CLOSED, GenMessage, GenMessageError, MESSAGE_TYPE_DATA,
    MESSAGE_TYPE_REQUEST, MessageHeader,
};

use super::StreamError;
use super::address::Kind;
use crate::connections::Connection;

/// The service's name.
pub(crate) const SERVICE: &str = "containerd.services.streaming.v1.Streaming";
pub(super) const METHOD: &str = "Stream";

pub(super) const INIT: &str = "containerd.services.streaming.v1.StreamInit";
pub(super) const DATA: &str = "containerd.types.transfer.Data";
pub(super) const WINDOW_UPDATE: &str = "containerd.types.transfer.WindowUpdate";
/// The acknowledgement has nothing to say.
const EMPTY: &str = "google.protobuf.Empty";

#[derive(Clone, PartialEq, prost::Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct StreamInit {
    #[prost(string, tag = "1")]
    pub(super) id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Data {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) data: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct WindowUpdate {
    #[prost(int32, tag = "1")]
    pub(super) update: i32,
}

/// What a client sends once its stream is open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Sent {
    /// So many more bytes may be sent to it.
    Window(u32),
    /// Bytes for a process's stdin.
    Data(Bytes),
}

/// The name of an Any's type, and its value.
fn any(payload: Vec<u8>) -> Result<(String, Bytes), StreamError> {
    let Any { type_url, value } = Any::decode(Bytes::from(payload))?;
    // A name may have the place of its type before it.
    let name = type_url.rsplit('/').next().unwrap_or_default();
    Ok((name.to_owned(), value))
}

/// The id by which a stream is asked for.
pub(super) fn init(payload: Vec<u8>) -> Result<String, StreamError> {
    match any(payload)? {
        (name, value) if name == INIT => Ok(StreamInit::decode(value)?.id),
        (name, _) => Err(StreamError::Unexpected(name)),
    }
}

/// What a client may send on a stream of this kind.
pub(super) fn sent(kind: Kind, payload: Vec<u8>) -> Result<Sent, StreamError> {
    let (name, value) = any(payload)?;
    match (kind, &*name) {
        (Kind::Stdin, DATA) => Ok(Sent::Data(Data::decode(value)?.data)),
        (Kind::Stdout | Kind::Stderr, WINDOW_UPDATE) => {
            let update = WindowUpdate::decode(value)?.update;
            match u32::try_from(update) {
                Ok(more) if more > 0 => Ok(Sent::Window(more)),
                _ => Err(StreamError::Window(update)),
            }
        }
        _ => Err(StreamError::Unexpected(name)),
    }
}

/// The request that opens a stream; `None` if it is for another service.
pub(crate) fn opening(frame: &GenMessage) -> Option<ttrpc::Request> {
    if frame.header.type_ != MESSAGE_TYPE_REQUEST {
        return None;
    }
    let request = ttrpc::Request::decode(&frame.payload).ok()?;
    (request.service == SERVICE).then_some(request)
}

/// The first message of a stream.
///
/// # Errors
/// If the method is another, or the client goes.
pub(super) async fn first(
    connection: &mut Connection,
    number: u32,
    request: ttrpc::Request,
) -> Result<Vec<u8>, StreamError> {
    if request.method != METHOD {
        return Err(StreamError::Method(request.method));
    }
    // A client may give its first message with the request.
    if !request.payload.is_empty() {
        return Ok(request.payload);
    }
    read(connection, number).await?.ok_or(StreamError::Gone)
}

/// The next message; `None` at the end, whether it was said or the client went.
pub(super) async fn read<R>(reader: &mut R, number: u32) -> Result<Option<Vec<u8>>, StreamError>
where
    R: tokio::io::AsyncRead + Unpin,
{
    let frame = match GenMessage::read_from(reader).await {
        Ok(frame) => frame,
        Err(GenMessageError::InternalError(error)) => {
            tracing::debug!(%error, "the stream's client went");
            return Ok(None);
        }
        Err(GenMessageError::ReturnError(_, error)) => return Err(StreamError::Ttrpc(error)),
    };
    let header = frame.header;
    if header.type_ != MESSAGE_TYPE_DATA || header.stream_id != number {
        return Err(StreamError::Frame(header.type_));
    }
    if header.flags & FLAG_REMOTE_CLOSED != 0 && header.flags & FLAG_NO_DATA != 0 {
        return Ok(None);
    }
    Ok(Some(frame.payload))
}

fn frame(mut header: MessageHeader, flags: u8, payload: &[u8]) -> Vec<u8> {
    header.set_flags(flags);
    let mut frame = Vec::<u8>::from(header);
    frame.extend_from_slice(payload);
    frame
}

/// Answers with a status instead of a stream.
pub(super) async fn refuse(
    connection: &mut Connection,
    number: u32,
    status: ttrpc::proto::Status,
) -> io::Result<()> {
    let mut response = ttrpc::Response::new();
    response.set_status(status);
    let payload = response.encode().map_err(io::Error::other)?;
    let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
    let header = MessageHeader::new_response(number, length);
    connection.write_all(&frame(header, 0, &payload)).await
}

/// An open stream, as whoever serves it has it. What the client sends is read by
/// a task that ends with this.
#[derive(Debug)]
pub(super) struct Stream {
    /// ttrpc's number of the stream on its connection.
    pub(super) number: u32,
    pub(super) writer: WriteHalf<Connection>,
    /// What the client sends; ends with the stream.
    pub(super) sent: mpsc::Receiver<Sent>,
    /// Cancelled to end the task that reads.
    pub(super) reader: CancellationToken,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.reader.cancel();
    }
}

impl Stream {
    async fn send(&mut self, type_url: &str, value: Vec<u8>) -> io::Result<()> {
        let any = Any {
            type_url: type_url.to_owned(),
            value: value.into(),
        };
        let payload = any.encode_to_vec();
        let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
        let header = MessageHeader::new_data(self.number, length);
        self.writer.write_all(&frame(header, 0, &payload)).await
    }

    /// Tells the client that its stream is open.
    pub(super) async fn acknowledge(&mut self) -> io::Result<()> {
        self.send(EMPTY, Vec::new()).await
    }

    /// Sends output. One that was cut short was not sent: the client cannot read
    /// a part of a frame.
    pub(super) async fn data(&mut self, data: &[u8]) -> io::Result<()> {
        let data = Data {
            data: Bytes::copy_from_slice(data),
        };
        self.send(DATA, data.encode_to_vec()).await
    }

    /// Lets the client send `update` bytes more.
    pub(super) async fn window(&mut self, update: u32) -> io::Result<()> {
        let update = i32::try_from(update).map_err(io::Error::other)?;
        let value = WindowUpdate { update }.encode_to_vec();
        self.send(WINDOW_UPDATE, value).await
    }

    /// Tells the client that nothing more comes.
    pub(super) async fn end(&mut self) -> io::Result<()> {
        let header = MessageHeader::new_data(self.number, 0);
        let flags = FLAG_REMOTE_CLOSED | FLAG_NO_DATA;
        self.writer.write_all(&frame(header, flags, &[])).await
    }
}

/// Reads what the client of a stream sends, in its order, until it ends.
pub(super) async fn receive(
    kind: Kind,
    number: u32,
    mut reader: ReadHalf<Connection>,
    to: mpsc::Sender<Sent>,
) -> Result<(), StreamError> {
    while let Some(payload) = read(&mut reader, number).await? {
        if to.send(sent(kind, payload)?).await.is_err() {
            break;
        }
    }
    Ok(())
}
