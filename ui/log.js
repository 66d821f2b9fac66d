// The log's box: asks for new lines while its page is seen, and keeps a bounded number of them.
// Lines become text nodes, never HTML.
const KEEP_LINES = 4000;
const KEEP_CHARS = 1000000;
const ACTIVE_MS = 1000;
const IDLE_MS = 5000;

const box = element.closest('#log');
const out = element.querySelector('[data-lines]');
const told = element.querySelector('[data-told]');
const find = element.querySelector('[data-find]');
const follow = element.querySelector('[data-follow]');
const whole = element.querySelector('[data-whole]');
const uid = new URLSearchParams(location.search).get('id') || '';

let lines = [];      // what is kept, oldest first
let chars = 0;
let dropped = 0;     // lines that are only in the file
let cursor = null;
let following = true;
let scrolled = false;  // paused by scrolling up, not by the button: going back to the end follows again
let unseen = 0;      // lines that came since the reader stopped to follow
let trouble = '';
let found = null;    // lines of the whole log that contain what was searched; null while the end of the log is shown

function keep(fresh) {
  for (const line of fresh) { lines.push(line); chars += line.length; }
  let gone = 0;
  while (lines.length - gone > KEEP_LINES || chars > KEEP_CHARS) chars -= lines[gone++].length;
  if (gone) { lines = lines.slice(gone); dropped += gone; }
  return gone;
}

function matches(line) {
  const words = find.value.trim().toLowerCase();
  return !words || line.toLowerCase().includes(words);
}

function draw() {
  if (found) return;
  const shown = lines.filter(matches);
  out.textContent = shown.length ? shown.join('\n') + '\n' : '';
  say(shown.length);
  toEnd();
}

function add(fresh) {
  const gone = keep(fresh);
  if (found) return;
  if (gone || find.value.trim()) { draw(); return; }
  out.append(fresh.join('\n') + '\n');
  say(lines.length);
  toEnd();
}

function toEnd() {
  if (following && !found) out.scrollTop = out.scrollHeight;
}

function say(shown) {
  const words = [];
  if (found) {
    told.textContent = found.said + (trouble ? ` · ${trouble}` : '');
    return;
  }
  if (trouble) words.push(trouble);
  else if (!lines.length) words.push('Nothing is written yet.');
  if (find.value.trim()) words.push(`${shown} of ${lines.length} lines`);
  if (dropped) words.push('earlier lines are in the download');
  if (!following && unseen) words.push(`${unseen} new ${unseen === 1 ? 'line' : 'lines'}`);
  told.textContent = words.join(' · ');
}

function setFollowing(on) {
  if (following === on) return;
  following = on;
  follow.textContent = on ? 'Pause' : 'Follow';
  follow.setAttribute('aria-pressed', String(on));
  if (on) { unseen = 0; draw(); }
}

// While it is paused nothing moves under the reader: new lines are kept aside, as many as are kept at all.
let aside = [];
function arrived(fresh) {
  if (following) { add(fresh); return; }
  unseen += fresh.length;
  aside.push(...fresh);
  if (aside.length > KEEP_LINES) { dropped += aside.length - KEEP_LINES; aside = aside.slice(-KEEP_LINES); }
  say(lines.length);
}
function backToEnd() {
  const waiting = aside;
  aside = [];
  scrolled = false;
  keep(waiting);
  setFollowing(true);
}

follow.addEventListener('click', () => (following ? (scrolled = false, setFollowing(false)) : backToEnd()));
out.addEventListener('scroll', () => {
  if (found) return;
  const atEnd = out.scrollHeight - out.scrollTop - out.clientHeight < 40;
  if (following && !atEnd) { setFollowing(false); scrolled = true; }
  else if (!following && scrolled && atEnd) backToEnd();
});
find.addEventListener('input', () => { found = null; draw(); });
find.addEventListener('keydown', async (event) => {
  const text = find.value.trim();
  if (event.key !== 'Enter' || !text) return;
  event.preventDefault();
  let answer;
  try {
    answer = await server.find_in_log({ uid, text });
  } catch (error) {
    answer = { error: 'the dashboard does not answer' };
  }
  if (find.value.trim() !== text) return;
  if (answer.error) { trouble = answer.error; say(0); return; }
  const number = answer.lines.length;
  found = { said: `whole log: ${answer.more ? 'the first ' : ''}${number} ${number === 1 ? 'line' : 'lines'}` };
  out.textContent = number ? answer.lines.join('\n') + '\n' : '';
  out.scrollTop = 0;
  say(number);
});

async function ask() {
  let wait = ACTIVE_MS;
  if (!document.hidden && element.isConnected) {
    try {
      const answer = await server.read_log({ uid, cursor });
      trouble = answer.error || '';
      if (answer.error) wait = IDLE_MS;
      else {
        const fresh = answer.lines;
        if (answer.cut && cursor === null) dropped += answer.cut;
        else if (answer.cut) fresh.unshift(`... ${answer.cut} lines are left out here; the download has them`);
        cursor = answer.cursor;
        whole.href = answer.address;
        whole.hidden = false;
        if (fresh.length) arrived(fresh);
        else if (!answer.active) wait = IDLE_MS;  // it can be resumed
      }
    } catch (error) {
      trouble = 'the dashboard does not answer; trying again';
      wait = IDLE_MS;
    }
    say(lines.filter(matches).length);
  }
  if (element.isConnected) setTimeout(ask, wait);
}
if (uid && box) ask();
