package idempotency

import (
	"net/http"
	"slices"
	"strings"
)

// finish ends the handler's access: what is written from now on is not
// recorded. The header is fixed here at the latest, and then the trailers.
//
// A goroutine of the handler may be in a Write that its client holds up. The
// record has what was written then, and finish does not wait: the result must
// be stored before the lease ends, or the handler would run again. send waits.
func (r *recorder) finish() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	r.changed.Broadcast()
	r.wroteNothing = !r.wroteHeader
	r.needHeaderLocked()
	if r.wroteNothing && !r.calling {
		r.lookAroundLocked()
	}
	if now := r.trailersLocked(); now != nil || r.trailersInHeader != nil {
		r.trailers = new(headerScratch).difference(r.trailersInHeader, now)
	}
}

// trailersLocked returns a copy of what the header has of trailers, or nil.
func (r *recorder) trailersLocked() (trailers http.Header) {
	for name, values := range r.header {
		if r.isTrailer(name) {
			if trailers == nil {
				trailers = make(http.Header)
			}
			trailers[name] = slices.Clone(values)
		}
	}
	return trailers
}

// isTrailer reports whether net/http would send a header as a trailer: one that
// the handler declared, or one with http.TrailerPrefix.
func (r *recorder) isTrailer(name string) bool {
	return strings.HasPrefix(name, http.TrailerPrefix) || r.declared[name]
}

// complete reports whether the recorder has the whole response. It has not when
// the response was too large, shorter than its Content-Length, or written
// around the recorder.
func (r *recorder) complete() bool {
	return !r.overflow && !r.wroteAround && (r.length < 0 || !bodyAllowed(r.status) || r.body.size == r.length)
}

// send sends the finished response to the client. Its chunks are free
// afterwards: encode has copied them, or a MemoryStore has taken the larger
// ones. An answer that comes later still reaches the client of a handler that
// wrote nothing: net/http sends the implied 200 when all middleware has
// returned. kept says that a retry gets that 200.
func (r *recorder) send(kept bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.waitLocked()
	h := r.w.Header()
	if !r.streaming {
		r.streaming = true
		applyFields(h, r.fields)
		announceTrailers(h, r.trailers)
		// From here on a hook of outer middleware works on the header of w.
		r.sent.Store(true)
		r.sendLocked()
		if r.implicit && !r.wroteNothing && r.body.size == 0 {
			_, _ = writeLocked(r, "") // as the handler did
		}
	}
	applyFields(h, r.trailers)
	r.body.free()
	r.late.open, r.late.kept = r.wroteNothing, kept
}

// withdraw ends the handler's access without sending what was held back. It
// reports whether the header has gone out before. If it has not, another answer
// follows, so withdraw waits for a 1xx that is on its way.
func (r *recorder) withdraw() (streaming bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.streaming {
		r.waitLocked()
	}
	r.dropLocked()
	return r.streaming
}

// crash ends the access of a handler that panicked. It waits for nothing, so
// that the panic goes on. When the handler wrote nothing, an outer recover may
// answer through this recorder, unless a 1xx is still held up.
func (r *recorder) crash() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dropLocked()
	r.late.open = !r.wroteHeader && !r.calling
}

// dropLocked ends the recording and the sending. While a chunk is being
// written, dropLocked does not return it to its pool.
func (r *recorder) dropLocked() {
	r.closed, r.dropped = true, true
	r.changed.Broadcast()
	if !r.calling {
		r.body.free()
	}
}

// encode appends the stored form of the finished response to scratch. With
// whole, or if the body has one chunk, that is all of it. Otherwise value ends
// with the first chunk, and parts are the others, which spares a large body a
// copy.
// encode returns nil when the headers are too large.
func (r *recorder) encode(scratch, digest []byte, keep func(name string) bool, whole bool) (value []byte, parts [][]byte) {
	markTransient(r.fields, keep, r.connection, r.body.size)
	// A Content-Length among the trailers is not the length of anything, so
	// none is kept: -1 is never equal to it.
	markTransient(r.trailers, keep, r.connection, -1)
	chunks := r.body.chunks
	if !whole && len(chunks) > 1 {
		chunks, parts = chunks[:1], slices.Clone(chunks[1:])
	}
	status := r.status
	if r.implicit && (r.wroteNothing || r.body.size > 0) {
		status = implicitStatus // not after a Write of nothing or a Flush, which are not repeated
	}
	return encodeResponse(scratch, status, digest, r.fields, r.trailers, r.body.size, chunks), parts
}
