// SPDX-License-Identifier: Apache-2.0
//! How a session begins: HELLO with version, token and target from the host,
//! ACCEPT or REFUSE from the guest.

use std::fmt;
use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use podhull_types::{ContainerId, Deadline, ExecId, ProcessRef, Token};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::frame::{Frame, Stream, VERSION};
use super::handle::SessionHandle;
use super::state::{Shared, Side};
use super::stream::{StreamReader, StreamWriter};
use super::{GuestSession, HostSession};
use crate::error::{ProtocolError, SessionError, TransportError};
use crate::lease::{Holder, HolderKind};
use crate::metrics;
use crate::transport::{TransportIo, VsockTransport};

const TARGET_PROCESS: u8 = 1;
const TARGET_FORWARD: u8 = 2;

/// What a session is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionTarget {
    /// The standard streams of a process.
    Process(ProcessRef),
    /// A TCP port in the pod's network namespace.
    Forward {
        /// The port.
        port: u16,
    },
}

impl fmt::Display for SessionTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(process) => write!(f, "{process}"),
            Self::Forward { port } => write!(f, "port {port}"),
        }
    }
}

fn encode_hello(token: &Token, target: &SessionTarget) -> Bytes {
    let mut hello = BytesMut::new();
    hello.put_u16_le(VERSION);
    hello.put_slice(token.expose());
    match target {
        SessionTarget::Process(process) => {
            hello.put_u8(TARGET_PROCESS);
            let exec = process.exec.as_ref().map_or("", ExecId::as_str);
            for id in [process.container.as_str(), exec] {
                // Ids are at most 76 bytes long.
                hello.put_u8(u8::try_from(id.len()).unwrap_or(u8::MAX));
                hello.put_slice(id.as_bytes());
            }
        }
        SessionTarget::Forward { port } => {
            hello.put_u8(TARGET_FORWARD);
            hello.put_u16_le(*port);
        }
    }
    hello.freeze()
}

fn decode_hello(mut hello: Bytes) -> Result<(Token, SessionTarget), ProtocolError> {
    const MALFORMED: ProtocolError = ProtocolError::Malformed("HELLO");
    let theirs = hello.try_get_u16_le().map_err(|_| MALFORMED)?;
    if theirs != VERSION {
        return Err(ProtocolError::Version {
            theirs,
            ours: VERSION,
        });
    }
    let mut token = [0; Token::LEN];
    hello.try_copy_to_slice(&mut token).map_err(|_| MALFORMED)?;
    let target = match hello.try_get_u8().map_err(|_| MALFORMED)? {
        TARGET_PROCESS => {
            let mut next = || -> Result<String, ProtocolError> {
                let length = usize::from(hello.try_get_u8().map_err(|_| MALFORMED)?);
                if hello.remaining() < length {
                    return Err(MALFORMED);
                }
                String::from_utf8(hello.split_to(length).into()).map_err(|_| MALFORMED)
            };
            let container = ContainerId::new(next()?)?;
            let exec = next()?;
            let exec = if exec.is_empty() {
                None
            } else {
                Some(ExecId::new(exec)?)
            };
            SessionTarget::Process(ProcessRef { container, exec })
        }
        TARGET_FORWARD => SessionTarget::Forward {
            port: hello.try_get_u16_le().map_err(|_| MALFORMED)?,
        },
        _ => return Err(MALFORMED),
    };
    if hello.has_remaining() {
        return Err(MALFORMED);
    }
    Ok((Token::from_bytes(token), target))
}

async fn read_frame(io: &mut TransportIo, buffer: &mut BytesMut) -> Result<Frame, SessionError> {
    loop {
        if let Some(frame) = Frame::decode(buffer)? {
            return Ok(frame);
        }
        match io.read_buf(buffer).await {
            Ok(0) => return Err(SessionError::Lost("ended in the handshake".into())),
            Ok(_) => {}
            Err(error) => return Err(lost(&error)),
        }
    }
}

fn lost(error: &io::Error) -> SessionError {
    SessionError::Lost(error.to_string())
}

fn unusable(error: &TransportError) -> SessionError {
    SessionError::Lost(error.to_string())
}

/// Opens a session as the host. The transport is closed if it fails, or is
/// cancelled.
///
/// # Errors
/// [`SessionError::Refused`] with the guest's words, or why it could not answer.
pub async fn open_session(
    mut transport: VsockTransport,
    token: &Token,
    target: &SessionTarget,
    by: Deadline,
) -> Result<HostSession, SessionError> {
    transport.rename_holder(Holder::new(HolderKind::Session, target.to_string()));
    transport.set_preparing(true);
    let greeting = async {
        let mut io = transport.io().map_err(|error| unusable(&error))?;
        let hello = Frame::Hello(encode_hello(token, target)).encode();
        io.write_all(&hello).await.map_err(|error| lost(&error))?;
        let mut buffer = BytesMut::new();
        match read_frame(&mut io, &mut buffer).await? {
            Frame::Accept => Ok((io, buffer)),
            Frame::Refuse(reason) => Err(SessionError::Refused { reason }),
            other => Err(ProtocolError::Unexpected(other.name()).into()),
        }
    };
    let greeted = by
        .run(greeting)
        .await
        .unwrap_or(Err(SessionError::Deadline("open the session")));
    transport.set_preparing(false);
    match greeted {
        Ok((io, buffer)) => {
            let shared = Shared::new(Side::Host);
            Ok(HostSession {
                input: StreamWriter::new(&shared, Stream::Input),
                output: StreamReader::new(&shared, Stream::Output),
                error: StreamReader::new(&shared, Stream::Error),
                handle: SessionHandle::start(transport, io, buffer, shared),
            })
        }
        Err(error) => {
            not_opened(&error, target);
            close_logged(transport, by).await;
            Err(error)
        }
    }
}

/// Counts and tells, once, why the guest gives no session.
fn not_opened(error: &SessionError, target: &SessionTarget) {
    match error {
        SessionError::Protocol(_) | SessionError::WrongToken => {
            metrics::PROTOCOL_ERRORS.inc();
            tracing::warn!(%target, %error, "no session: the guest broke the protocol");
        }
        SessionError::Refused { .. } => {
            metrics::REFUSED.inc();
            tracing::warn!(%target, %error, "no session");
        }
        SessionError::Lost(_) | SessionError::Closed | SessionError::Deadline(_) => {
            tracing::info!(%target, %error, "no session");
        }
    }
}

/// Counts and tells, once, why a connection becomes no session.
fn not_received(error: &SessionError) {
    match error {
        SessionError::WrongToken => &metrics::WRONG_TOKEN,
        SessionError::Protocol(_) => &metrics::BAD_GREETING,
        // It said too little, and then ended or went on for too long.
        SessionError::Lost(_)
        | SessionError::Closed
        | SessionError::Deadline(_)
        | SessionError::Refused { .. } => &metrics::NO_GREETING,
    }
    .inc();
    tracing::warn!(%error, "connection refused: it is no session");
}

async fn close_logged(transport: VsockTransport, by: Deadline) {
    let report = transport.close(by).await;
    if !report.is_clean() {
        tracing::warn!(%report, "closing a session's transport");
    }
}

/// A session that the host asks for and the guest has not answered yet.
#[derive(Debug)]
#[must_use = "accept or refuse it"]
pub struct IncomingSession {
    transport: VsockTransport,
    io: TransportIo,
    buffer: BytesMut,
    target: SessionTarget,
}

/// Receives HELLO as the guest. The transport is closed if it fails, so a peer
/// without the token learns nothing but the end of its connection.
///
/// # Errors
/// [`SessionError::WrongToken`], or how the peer broke the protocol.
pub async fn receive_session(
    transport: VsockTransport,
    token: &Token,
    by: Deadline,
) -> Result<IncomingSession, SessionError> {
    let greeting = async {
        let mut io = transport.io().map_err(|error| unusable(&error))?;
        let mut buffer = BytesMut::new();
        let hello = match read_frame(&mut io, &mut buffer).await? {
            Frame::Hello(hello) => hello,
            other => return Err(ProtocolError::Unexpected(other.name()).into()),
        };
        let (theirs, target) = decode_hello(hello)?;
        if !token.matches(&theirs) {
            return Err(SessionError::WrongToken);
        }
        Ok((io, buffer, target))
    };
    let greeted = by
        .run(greeting)
        .await
        .unwrap_or(Err(SessionError::Deadline("receive HELLO")));
    match greeted {
        Ok((io, buffer, target)) => {
            transport.rename_holder(Holder::new(HolderKind::Session, target.to_string()));
            Ok(IncomingSession {
                transport,
                io,
                buffer,
                target,
            })
        }
        Err(error) => {
            not_received(&error);
            close_logged(transport, by).await;
            Err(error)
        }
    }
}

impl IncomingSession {
    /// What the host wants.
    #[must_use]
    pub fn target(&self) -> &SessionTarget {
        &self.target
    }

    /// Says yes.
    ///
    /// # Errors
    /// [`SessionError::Lost`] if the host is gone already.
    pub async fn accept(mut self, by: Deadline) -> Result<GuestSession, SessionError> {
        let accept = Frame::Accept.encode();
        let sent = by.run(self.io.write_all(&accept)).await;
        let sent = match sent {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(lost(&error)),
            Err(_) => Err(SessionError::Deadline("accept the session")),
        };
        if let Err(error) = sent {
            drop(self.io);
            close_logged(self.transport, by).await;
            return Err(error);
        }
        let shared = Shared::new(Side::Guest);
        Ok(GuestSession {
            input: StreamReader::new(&shared, Stream::Input),
            output: StreamWriter::new(&shared, Stream::Output),
            error: StreamWriter::new(&shared, Stream::Error),
            handle: SessionHandle::start(self.transport, self.io, self.buffer, shared),
        })
    }

    /// Says no, and why (at most 1 KiB arrives).
    pub async fn refuse(mut self, reason: &str, by: Deadline) {
        let refusal = Frame::Refuse(reason.to_owned()).encode();
        match by.run(self.io.write_all(&refusal)).await {
            // The host closes when it has read the refusal; closing first could
            // lose it on the way.
            Ok(Ok(())) => drop(by.run(self.io.read_u8()).await),
            Ok(Err(error)) => tracing::debug!(%error, "host gone before the refusal"),
            Err(elapsed) => tracing::debug!(%elapsed, "refusal not taken"),
        }
        drop(self.io);
        close_logged(self.transport, by).await;
    }
}
