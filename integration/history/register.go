package history

import (
	"time"

	"github.com/anishathalye/porcupine"
)

// A registerInput is a step of a key as the register model sees it.
type registerInput struct {
	what int
	run  string
}

const (
	claims  = iota // a run is let in
	answers        // a client gets the lasting answer of a run
	refused        // a client is told that the key is held, or was
)

// register is a key as a register that is written once: absent until the answer
// of a run is stored, and that answer from then on. Claims and refusals belong
// before it.
var register = porcupine.Model{
	Init: func() any { return "" },
	Step: func(state, input, _ any) (bool, any) {
		stored, in := state.(string), input.(registerInput)
		switch {
		case stored == "" && in.what == answers:
			return true, in.run
		case stored == "":
			return true, stored
		}
		return in.what == answers && in.run == stored, stored
	},
}

// searchTime is how long a linearization of one key is searched for.
const searchTime = 5 * time.Second

// checkRegister searches for an order of the key's claims and answers that is
// one of the model and keeps to their times. The rules above look at pairs of
// things; this looks at all of them at once. Each life of the key has its own
// register.
//
// What a client does not know constrains nothing, and answers that went out
// though the store had failed are no part of the register.
func (c *checker) checkRegister() {
	for n := range c.lives {
		c.checkLife(n)
	}
}

func (c *checker) checkLife(life int) {
	var steps []porcupine.Operation
	add := func(what int, run string, from, to time.Duration) {
		steps = append(steps, porcupine.Operation{
			ClientId: len(steps), Input: registerInput{what, run}, Call: int64(from), Return: int64(to),
		})
	}
	for _, r := range c.runs {
		if r.life == life {
			add(claims, r.Run, r.Sent, r.Returned)
		}
	}
	for _, op := range c.ops {
		r := c.byID[op.Run]
		switch {
		case op.Err != "", c.lifeOf(op) != life:
		case op.Code == "in_progress" || op.Code == "outcome_unknown":
			add(refused, "", op.Start, op.End)
		case op.Code == notStored:
			add(answers, notStored, op.Start, op.End)
		case op.Code == "" && (op.Replayed || r != nil && r.stored && len(r.smalls) == 0 && r.storedBy <= op.End):
			add(answers, op.Run, op.Start, op.End)
		}
	}
	switch porcupine.CheckOperationsTimeout(register, steps, c.search) {
	case porcupine.Illegal:
		c.violate(Register, "no order of %d claims and answers makes a register that is written once", len(steps))
	case porcupine.Unknown:
		c.violate(Unjudged, "no order of %d claims and answers was found within %v", len(steps), c.search)
	}
}
