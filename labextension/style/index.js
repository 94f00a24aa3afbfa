import './base.css';
import './saved.css';
